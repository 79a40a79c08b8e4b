//! One opened GPU: its context, two streams and the kernels that were built ahead.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream, DriverError, result, sys,
};
use cudarc::nvrtc::Ptx;

use super::error::{GpuError, fit};

/// Dynamic shared memory that a block may have (227 KiB on compute capability 9.0), which is what tile kernels ask for.
pub const SHARED_BYTES: u32 = 232_448;

/// The device code, by the source file that it is made of.
const CUBINS: [(&str, &[u8]); 6] = [
    ("coding", include_bytes!("sm90a/coding.cubin")),
    ("experts", include_bytes!("sm90a/experts.cubin")),
    ("attention", include_bytes!("sm90a/attention.cubin")),
    ("gate", include_bytes!("sm90a/gate.cubin")),
    ("rows", include_bytes!("sm90a/rows.cubin")),
    ("sample", include_bytes!("sm90a/sample.cubin")),
];

/// A kernel on its device, with the parameters that it takes.
#[derive(Clone, Debug)]
pub struct Kernel(CudaFunction);

/// How a kernel is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    pub blocks: (u32, u32, u32),
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// Which of a device's streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// What computes.
    Compute,
    /// What computes in turn with it.
    Beside,
    /// What brings weights in beside it.
    Copy,
}

/// A point in a lane's work. One that was not set counts as reached.
#[derive(Debug)]
pub struct Mark(CudaEvent);

/// See the module's text. Cheap to clone.
#[derive(Clone)]
pub struct Gpu {
    context: Arc<CudaContext>,
    compute: Arc<CudaStream>,
    beside: Arc<CudaStream>,
    copy: Arc<CudaStream>,
    modules: Arc<Vec<(&'static str, Arc<CudaModule>)>>,
    name: String,
    processors: u32,
}

impl Gpu {
    /// Opens `cuda:ordinal` and loads the kernels.
    pub fn open(ordinal: usize) -> Result<Gpu, GpuError> {
        // SAFETY: loads the driver's library, whose initialisers are sound, and looks nothing up in it.
        if !unsafe { sys::is_culib_present() } {
            return Err(GpuError::NoDriver);
        }
        let failed = |doing| move |error| GpuError::new(ordinal, doing, error);
        match result::init() {
            Ok(()) => {}
            Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => {
                return Err(GpuError::NoDevice { ordinal, count: 0 });
            }
            // A library for linking that no driver stands behind.
            Err(DriverError(sys::CUresult::CUDA_ERROR_STUB_LIBRARY)) => {
                return Err(GpuError::NoDriver);
            }
            Err(error) => return Err(failed("initialisation")(error)),
        }
        let mut driver = 0;
        // SAFETY: writes one integer.
        let asked = unsafe { sys::cuDriverGetVersion(&mut driver) }.result();
        asked.map_err(failed("asking for the driver's version"))?;
        let count = result::device::get_count().map_err(failed("counting devices"))?;
        fit(driver, ordinal, count.max(0) as usize, || describe(ordinal))?;

        let context = CudaContext::new(ordinal).map_err(failed("making a context"))?;
        // SAFETY: streams are ordered by events and waits of this crate's own (`Memory` is freed only when they are idle).
        unsafe { context.disable_event_tracking() };
        let stream = || context.new_stream().map_err(failed("making a stream"));
        let (compute, beside, copy) = (stream()?, stream()?, stream()?);
        let modules = CUBINS.iter().map(|&(name, image)| {
            let image = Ptx::from_binary(image.to_vec());
            let module = context.load_module(image).map_err(failed("loading kernels"))?;
            Ok((name, module))
        });
        let modules = Arc::new(modules.collect::<Result<Vec<_>, GpuError>>()?);
        let name = context.name().map_err(failed("asking for its name"))?;
        let processors = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let processors =
            context.attribute(processors).map_err(failed("counting its processors"))?;
        let processors = processors.max(1) as u32;
        Ok(Gpu { context, compute, beside, copy, modules, name, processors })
    }
}

impl Gpu {
    pub fn ordinal(&self) -> usize {
        self.context.ordinal()
    }

    /// As the driver calls it, such as "NVIDIA H800".
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Streaming multiprocessors.
    pub fn processors(&self) -> u32 {
        self.processors
    }

    /// Bytes of device memory that are free, and all.
    pub fn memory(&self) -> Result<(usize, usize), GpuError> {
        let found = self.bind().and_then(|()| result::mem_get_info());
        found.map_err(|error| self.error("asking for free memory", error))
    }

    /// The kernel `name` of source file `source`, allowed `shared` bytes of dynamic shared memory.
    pub fn kernel(&self, source: &str, name: &str, shared: u32) -> Result<Kernel, GpuError> {
        let missing = DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND);
        let module =
            self.modules.iter().find(|(file, _)| *file == source).map(|(_, module)| module);
        let load = || {
            let function = module.ok_or(missing)?.load_function(name)?;
            let limit = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(limit, shared as i32)?;
            Ok(Kernel(function))
        };
        load().map_err(|error| self.error("looking a kernel up", error))
    }

    /// Has `lane` run `kernel`, after what was given to it before.
    ///
    /// # Safety
    /// `args` point to values of the kernel's parameter types, in their order; device memory that they name is as long as
    /// the kernel reads and writes, and nothing else uses what it writes until the lane has been waited for.
    pub unsafe fn launch(
        &self,
        lane: Lane,
        kernel: &Kernel,
        grid: Grid,
        args: &mut [*mut c_void],
    ) -> Result<(), GpuError> {
        let (threads, stream) = ((grid.threads, 1, 1), self.stream(lane).cu_stream());
        let function = kernel.0.cu_function();
        let launched = self.bind().and_then(|()| {
            // SAFETY: the function is kept loaded by `kernel`; the rest is the caller's promise.
            unsafe {
                result::launch_kernel(function, grid.blocks, threads, grid.shared, stream, args)
            }
        });
        launched.map_err(|error| self.error("a launch", error))
    }

    /// Waits until `lane` has done all it was given.
    pub fn wait(&self, lane: Lane) -> Result<(), GpuError> {
        self.stream(lane).synchronize().map_err(|error| self.error("computing", error))
    }

    /// A mark that is not set.
    pub fn mark(&self) -> Result<Mark, GpuError> {
        let made = self.context.new_event(None);
        made.map(Mark).map_err(|error| self.error("making an event", error))
    }

    /// Sets `mark` behind all that `lane` was given.
    pub fn set(&self, mark: &Mark, lane: Lane) -> Result<(), GpuError> {
        let set = mark.0.record(self.stream(lane));
        set.map_err(|error| self.error("recording an event", error))
    }

    /// Whether `mark` is reached.
    pub fn is_reached(&self, mark: &Mark) -> Result<bool, GpuError> {
        let asked = self.bind().and_then(|()| mark.0.try_is_complete());
        asked.map_err(|error| self.error("computing", error))
    }

    /// Waits until `mark` is reached.
    pub fn reach(&self, mark: &Mark) -> Result<(), GpuError> {
        mark.0.synchronize().map_err(|error| self.error("computing", error))
    }

    pub(super) fn stream(&self, lane: Lane) -> &CudaStream {
        match lane {
            Lane::Compute => &self.compute,
            Lane::Beside => &self.beside,
            Lane::Copy => &self.copy,
        }
    }

    /// Makes the context the calling thread's.
    pub(super) fn bind(&self) -> Result<(), DriverError> {
        self.context.bind_to_thread()
    }

    pub(super) fn error(&self, doing: &'static str, error: DriverError) -> GpuError {
        GpuError::new(self.ordinal(), doing, error)
    }
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cuda:{} ({})", self.ordinal(), self.name)
    }
}

/// Name and compute capability of a device that is there.
fn describe(ordinal: usize) -> Result<(String, (i32, i32)), GpuError> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    };
    let ask = || {
        let device = result::device::get(ordinal as i32)?;
        // SAFETY: `device` was just given by the driver.
        let attribute = |which| unsafe { result::device::get_attribute(device, which) };
        let major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        Ok((result::device::get_name(device)?, (major, minor)))
    };
    ask().map_err(|error| GpuError::new(ordinal, "asking what it is", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_driver_opening_says_so_and_does_not_panic() {
        // SAFETY: as in `Gpu::open`.
        let driver = unsafe { sys::is_culib_present() };
        match Gpu::open(usize::MAX >> 33) {
            Ok(gpu) => panic!("{gpu:?} cannot be there"),
            Err(GpuError::NoDriver) => assert!(!driver),
            Err(error) => assert!(driver, "{error}"),
        }
    }
}
