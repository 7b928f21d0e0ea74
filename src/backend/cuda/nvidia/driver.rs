//! The driver: whether there is one, whether it is new enough, and how many GPUs it shows.

use cudarc::driver::{DriverError, result, sys};

use super::library::{self, Library, Surroundings};
use super::{Error, OLDEST_SM};

/// The oldest CUDA that a driver must be for: NVRTC 12 is the first that has all of `sm_90a`.
const OLDEST: u32 = 12;

/// A driver that works, with at least one GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Driver {
    /// The newest CUDA that it is for: (13, 0).
    pub version: (u32, u32),
    /// GPUs that this process sees.
    pub devices: usize,
}

impl Driver {
    /// Looks for the driver and starts it.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::OldDriver`], [`Error::NoDevice`], or what the driver says.
    pub fn start(surroundings: &Surroundings) -> Result<Self, Error> {
        // The driver works with itself, whatever the version.
        let open = library::open(Library::Driver, OLDEST, surroundings)?;
        // Without this, every call of cudarc's could panic.
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
        judged(version, started.and_then(|()| result::device::get_count()), driver_says)
    }
}

impl Driver {
    /// Refuses GPUs that are too old, before any is opened.
    ///
    /// # Errors
    /// [`Error::OldGpu`], or what the driver says.
    pub fn check_age(&self) -> Result<(), Error> {
        use sys::CUdevice_attribute as Attribute;
        for index in 0..self.devices {
            let asked = result::device::get(index as i32).and_then(|device| {
                // SAFETY: the device is of this driver.
                let major = unsafe {
                    result::device::get_attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?
                };
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

/// What to make of the driver's answers: its version (13000 for 13.0) and the number of GPUs.
fn judged(
    version: i32,
    devices: Result<i32, DriverError>,
    says: impl Fn(DriverError) -> String,
) -> Result<Driver, Error> {
    let version = u32::try_from(version).unwrap_or(0);
    let version = (version / 1000, version % 1000 / 10);
    // cuInit fails before the version is known to be too old, so both count.
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

/// An error of the driver in its own words: "CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure".
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
        judged(version, devices.map_err(DriverError), |e| format!("{:?}", e.0)).unwrap_err().to_string()
    }

    #[test]
    fn each_way_to_have_no_gpu_has_its_message() {
        let old = message(11080, Ok(1));
        assert!(old.contains("CUDA 11.8") && old.contains("525"), "{old}");
        // Some old drivers fail to start on a new kernel: the age is what helps to know.
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
        let driver = judged(12040, Ok(8), |_| unreachable!()).unwrap();
        assert_eq!(driver, Driver { version: (12, 4), devices: 8 });
    }
}
