//! Memory of one GPU that another one reads: of the same process by peer access, of another process by CUDA IPC. The context of the
//! reading GPU is current.

use std::mem::MaybeUninit;
use std::sync::Arc;

use cudarc::driver::{CudaContext, DriverError, result, sys};

use super::driver::driver_says;
use super::fault;
use crate::backend::cuda::gpu::{Address, Error, Imported};

/// Enables peer access to the GPU with this address, where the hardware has it, to so many GPUs; elsewhere the driver copies through
/// the host.
pub(super) fn reach(context: &Arc<CudaContext>, at: Address) -> Result<(), Error> {
    let own = context.cu_device();
    let owner = owner(at).map_err(fault("cuPointerGetAttribute"))?;
    if owner == own || !can_access(own, owner).map_err(fault("cuDeviceCanAccessPeer"))? {
        return Ok(());
    }
    // SAFETY: the device exists. Its primary context is alive: it owns the memory.
    let peer = unsafe { result::primary_ctx::retain(owner) }.map_err(fault("cuDevicePrimaryCtxRetain"))?;
    // SAFETY: both contexts are alive.
    let enabled = unsafe { sys::cuCtxEnablePeerAccess(peer, 0) }.result();
    // SAFETY: retained above; the owner of the memory holds the context, too.
    unsafe { result::primary_ctx::release(owner) }.map_err(fault("cuDevicePrimaryCtxRelease"))?;
    match enabled {
        Ok(())
        | Err(DriverError(
            sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED | sys::CUresult::CUDA_ERROR_TOO_MANY_PEERS,
        )) => Ok(()),
        Err(error) => Err(fault("cuCtxEnablePeerAccess")(error)),
    }
}

/// The GPU whose memory contains this address.
fn owner(at: Address) -> Result<sys::CUdevice, DriverError> {
    let mut ordinal: i32 = 0;
    let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
    // SAFETY: this attribute is an int.
    unsafe { sys::cuPointerGetAttribute((&raw mut ordinal).cast(), attribute, at.0) }.result()?;
    result::device::get(ordinal)
}

fn can_access(own: sys::CUdevice, owner: sys::CUdevice) -> Result<bool, DriverError> {
    let mut can = 0;
    // SAFETY: both devices exist.
    unsafe { sys::cuDeviceCanAccessPeer(&mut can, own, owner) }.result()?;
    Ok(can != 0)
}

/// A handle of the allocation that contains this address, and the offset in it.
pub(super) fn export(at: Address) -> Result<Vec<u8>, Error> {
    let (mut base, mut size) = (0, 0);
    // SAFETY: the address is in an allocation.
    unsafe { sys::cuMemGetAddressRange_v2(&mut base, &mut size, at.0) }
        .result()
        .map_err(fault("cuMemGetAddressRange"))?;
    let mut handle = MaybeUninit::<sys::CUipcMemHandle>::uninit();
    // SAFETY: the base of an allocation; the handle is written if the call succeeds.
    let handle = unsafe { sys::cuIpcGetMemHandle(handle.as_mut_ptr(), base).result().map(|()| handle.assume_init()) };
    let handle = handle.map_err(cannot("cuIpcGetMemHandle"))?;
    let bytes = handle.reserved.iter().map(|byte| *byte as u8);
    Ok(bytes.chain((at.0 - base).to_le_bytes()).collect())
}

/// Opens what [`export`] gave in another process.
pub(super) fn import(exported: &[u8]) -> Result<Imported, Error> {
    let malformed = || Error::Fault { call: "import of memory".into(), message: "another rank sent no handle".into() };
    let (bytes, offset) = exported.split_last_chunk::<8>().ok_or_else(malformed)?;
    let bytes: [u8; 64] = bytes.try_into().map_err(|_| malformed())?;
    let handle = sys::CUipcMemHandle { reserved: bytes.map(|byte| byte as _) };
    let lazily = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
    let mut base = 0;
    // SAFETY: a handle of the driver in another process.
    unsafe { sys::cuIpcOpenMemHandle_v2(&mut base, handle, lazily) }.result().map_err(cannot("cuIpcOpenMemHandle"))?;
    let base = Address(base);
    Ok(Imported { at: base.offset(u64::from_le_bytes(*offset) as usize), base })
}

/// Closes imported memory.
pub(super) fn close(imported: Imported) -> Result<(), Error> {
    // SAFETY: it was opened once for each import, and no queued work uses it.
    unsafe { sys::cuIpcCloseMemHandle(imported.base.0) }.result().map_err(fault("cuIpcCloseMemHandle"))
}

/// What helps where processes cannot share memory: in containers, without a link between the GPUs.
fn cannot(call: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| Error::Fault {
        call: call.into(),
        message: format!(
            "{}: the GPUs of different processes cannot read each other's memory here. Start the ranks of a machine as threads of one \
             process (--ranks without mpirun or srun), let every process see all GPUs and share the IPC namespace, or use --offload \
             host in place of --shard-frozen",
            driver_says(error)
        ),
    }
}
