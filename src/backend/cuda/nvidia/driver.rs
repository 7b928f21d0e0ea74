//! The driver: finds it, checks its version, and counts the GPUs.

use cudarc::driver::{DriverError, result, sys};

use super::library::{self, Library, Surroundings};
use super::{Error, OLDEST_SM};

/// The oldest CUDA version that a driver must support: NVRTC 12 is the first with all of `sm_90a`.
const OLDEST: u32 = 12;

/// A working driver with at least one GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Driver {
    /// The newest CUDA version that it supports: (13, 0).
    pub version: (u32, u32),
    /// GPUs that this process sees.
    pub devices: usize,
}

impl Driver {
    /// Finds the driver and initializes it.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::OldDriver`], [`Error::NoDevice`], or the driver's error.
    pub fn start(surroundings: &Surroundings) -> Result<Self, Error> {
        // The driver's file name is the same for all versions.
        let open = library::open(Library::Driver, OLDEST, surroundings)?;
        // Without this check, every call of cudarc could panic.
        // SAFETY: it only opens the library.
        if !unsafe { sys::is_culib_present() } {
            let refused = vec![format!("{}: not found by its name libcuda.so.1", open.path.display())];
            let (library, names, remedy) =
                (Library::Driver, "libcuda.so.1".into(), "put its folder into LD_LIBRARY_PATH");
            return Err(Error::Missing { library, names, looked_in: Vec::new(), refused, remedy });
        }
        let mut version = 0;
        // SAFETY: it may be called before cuInit (CUDA Driver API, "Version Management").
        let asked = unsafe { sys::cuDriverGetVersion(&mut version) }.result();
        let started = asked.and_then(|()| result::init());
        interpret(version, started.and_then(|()| result::device::get_count()), driver_says)
    }
}

impl Driver {
    /// Checks that all GPUs are new enough, before any is opened.
    ///
    /// # Errors
    /// [`Error::OldGpu`], or the driver's error.
    pub fn check_age(&self) -> Result<(), Error> {
        use sys::CUdevice_attribute as Attribute;
        for index in 0..self.devices {
            let asked = result::device::get(index as i32).and_then(|device| {
                // SAFETY: the device is of this driver.
                let major = unsafe {
                    result::device::get_attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?
                };
                // SAFETY: as above.
                let minor = unsafe {
                    result::device::get_attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?
                };
                Ok((device, (10 * major + minor) as u32))
            });
            let says = |e| Error::Driver { call: "cuDeviceGetAttribute", message: driver_says(e) };
            let (device, sm) = asked.map_err(says)?;
            if sm < OLDEST_SM {
                let name = result::device::get_name(device).map_err(says)?;
                return Err(Error::OldGpu { name, sm });
            }
        }
        Ok(())
    }
}

/// Interprets the driver's version (13000 for 13.0) and the number of GPUs.
fn interpret(
    version: i32,
    devices: Result<i32, DriverError>,
    says: impl Fn(DriverError) -> String,
) -> Result<Driver, Error> {
    let version = u32::try_from(version).unwrap_or(0);
    let version = (version / 1000, version % 1000 / 10);
    // cuInit of an old driver may fail, so the version is checked first.
    if version != (0, 0) && version.0 < OLDEST {
        return Err(Error::OldDriver { version, oldest: OLDEST });
    }
    match devices {
        Ok(n) if n > 0 => Ok(Driver { version, devices: n as usize }),
        Ok(_) | Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => Err(Error::NoDevice),
        Err(DriverError(sys::CUresult::CUDA_ERROR_STUB_LIBRARY)) => Err(Error::Stub),
        Err(e) => Err(Error::Driver { call: "cuInit", message: says(e) }),
    }
}

/// The driver's name and text of an error: "CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure".
pub(super) fn driver_says(error: DriverError) -> String {
    let (name, text) = (error.error_name(), error.error_string());
    match (name, text) {
        (Ok(name), Ok(text)) => format!("{}: {}", name.to_string_lossy(), text.to_string_lossy()),
        _ => format!("{:?}", error.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(version: i32, devices: Result<i32, sys::CUresult>) -> String {
        interpret(version, devices.map_err(DriverError), |e| format!("{:?}", e.0)).unwrap_err().to_string()
    }

    #[test]
    fn each_way_to_have_no_gpu_has_its_message() {
        let old = message(11080, Ok(1));
        assert!(old.contains("CUDA 11.8") && old.contains("525"), "{old}");
        // Some old drivers fail to initialize on a new kernel: their age is the useful message.
        assert_eq!(message(11080, Err(sys::CUresult::CUDA_ERROR_UNKNOWN)), old);
        for none in [Ok(0), Err(sys::CUresult::CUDA_ERROR_NO_DEVICE)] {
            let message = message(13000, none);
            assert!(message.contains("CUDA_VISIBLE_DEVICES"), "{message}");
        }
        let stub = message(0, Err(sys::CUresult::CUDA_ERROR_STUB_LIBRARY));
        assert!(stub.contains("stubs") && stub.contains("LD_LIBRARY_PATH"), "{stub}");
        let other = message(13000, Err(sys::CUresult::CUDA_ERROR_SYSTEM_NOT_READY));
        assert!(other.contains("CUDA_ERROR_SYSTEM_NOT_READY"), "{other}");
    }

    #[test]
    fn a_driver_with_gpus_tells_its_version() {
        let driver = interpret(12040, Ok(8), |_| unreachable!()).unwrap();
        assert_eq!(driver, Driver { version: (12, 4), devices: 8 });
    }
}
