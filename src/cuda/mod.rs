//! The fused loss on NVIDIA GPUs, from compute capability 8.0.
//!
//! Device memory in, device memory out, on the caller's stream: a call launches three to five kernels and
//! returns. It allocates nothing and waits for nothing, so it can be captured in a CUDA graph. What it
//! needs beside its arguments, 33 bytes a token and 100 KB, is a [`Workspace`], made once.
//!
//! ```no_run
//! use atkd::cuda::{self, DeviceBatch, DeviceLogits, DeviceLogitsMut, Kernels, Workspace};
//! use atkd::Objective;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let context = cuda::context(0)?;
//! let stream = context.default_stream();
//! let kernels = Kernels::load(&context)?;
//! let (tokens, vocab) = (4096, 128_256);
//! let mut workspace = Workspace::new(&kernels, &stream, tokens)?;
//!
//! let teacher = stream.alloc_zeros::<half::bf16>(tokens * vocab)?;
//! let mut student = stream.alloc_zeros::<half::bf16>(tokens * vocab)?;
//! let labels = stream.alloc_zeros::<i64>(tokens)?;
//! let batch = DeviceBatch::new(DeviceLogits::new(&teacher, tokens, vocab)?, &labels)?;
//! let student = DeviceLogitsMut::new(&mut student, tokens, vocab)?;
//! // The gradient replaces the student's logits; a device scalar may scale it.
//! workspace.forward_backward_in_place(&stream, &Objective::default(), &batch, student, None)?;
//! println!("loss {}", workspace.read_loss(&stream)?);
//! # Ok(())
//! # }
//! ```
//!
//! The driver is found at run time, so one binary runs with and without a GPU. The kernels are part of
//! the binary if an nvcc of CUDA 12.8 or later compiled them when it was built: `$NVCC`, or else the first in
//! `$CUDA_HOME`, `$CUDA_PATH`, `PATH`, `/usr/local/cuda` and Python's packages that can. If none did, [`Kernels::load`]
//! says why, and how to get one. An empty `$NVCC` asks for a build without kernels.
//!
//! Labels are on the device, where no error can be returned: a kernel that meets one outside the
//! vocabulary drops its token and notes it in the workspace: the [`loss`](Workspace::loss) on the device is NaN, and
//! the next [`read`](Workspace::read) or [`read_loss`](Workspace::read_loss) returns it as an error.
//!
//! Hard tokens are those of one call. Where tokens of several calls, or devices, are to compete with each other,
//! [`Workspace::teacher_margins`] gives the margins to select by, [`Workspace::select_hard`] selects among all of them,
//! and [`DeviceBatch::with_hard`] gives each call its share.
//!
//! For logits of a batch that are never there all at once [`Workspace::begin`] starts a call in stages, a [`Session`],
//! into which ranges of tokens go one after the other. With the feature `head`, `Head` is such a call behind the models' last
//! layers, of hidden states and weights.
//!
//! For ranks that have some columns of the logits each the stages of [`Kernels::launch_shard_raw`], those of
//! [`shards`](crate::shards), agree on the loss and write the gradient of each rank's columns. With the feature `nccl`,
//! `Workspace::launch_over_ranks` is a whole call over ranks of columns, of tokens, or of both.

mod by_address;
#[cfg(feature = "head")]
mod head;
mod host;
mod kernels;
#[cfg(feature = "nccl")]
mod nccl;
#[cfg(feature = "head")]
mod products;
mod session;
mod shards;
mod tensor;
#[cfg(feature = "battery")]
pub mod unfused;
mod workspace;

use std::sync::Arc;

pub use cudarc;
use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaContext, DriverError};

pub use crate::call::{
    RawCall, RawLabels, RawLogits, RawOutput, RawRows, RawSelection, RawShard, RawSparseCall,
    RawSparseTeacher, RawStage, RawStates, RawTeacher, RawTokens,
};
use crate::{Error, Result};
#[cfg(feature = "head")]
pub use head::{DeviceGradients, DeviceLayer, Head};
pub use kernels::Kernels;
#[cfg(feature = "nccl")]
pub use nccl::Ranks;
pub use session::{RawSession, Session};
pub use tensor::{
    DeviceBatch, DeviceElements, DeviceElementsMut, DeviceLabels, DeviceLogits, DeviceLogitsMut,
    DeviceSparseTeacher, DeviceTeacher, DeviceTokens,
};
pub use workspace::Workspace;

/// The driver's functions that cudarc calls for this crate and its users: it panics where one is missing.
#[cfg(any(test, not(feature = "candle-cuda")))]
const FUNCTIONS: [&str; 45] = [
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventElapsedTime",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuInit",
    "cuLaunchKernelEx",
    "cuMemAllocAsync",
    "cuMemAlloc_v2",
    "cuMemFreeAsync",
    "cuMemFree_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD2D8Async",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamIsCapturing",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
];

/// The primary context of a device.
///
/// # Errors
/// If there is no driver, one that lacks functions of CUDA 12.0, or no such device.
pub fn context(ordinal: usize) -> Result<Arc<CudaContext>> {
    // With candle-cuda the driver's library is linked, and so is there.
    #[cfg(not(feature = "candle-cuda"))]
    find_functions()?;
    let devices = match CudaContext::device_count() {
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => 0,
        devices => devices.map_err(driver("counting the devices"))? as usize,
    };
    if ordinal >= devices {
        return Err(Error::NoDevice { ordinal, devices });
    }
    CudaContext::new(ordinal).map_err(driver("opening the device"))
}

#[cfg(not(feature = "candle-cuda"))]
fn find_functions() -> Result<()> {
    // SAFETY: looks whether it can be loaded.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Err(Error::NoDriver);
    }
    // SAFETY: it can be loaded, and what is found in it is not called here.
    let missing = unsafe {
        let library = cudarc::driver::sys::culib();
        FUNCTIONS.iter().find(|name| library.get::<fn()>(name.as_bytes()).is_err())
    };
    match missing {
        None => Ok(()),
        Some(name) => Err(Error::Driver {
            doing: "looking for the driver's functions",
            code: CUresult::CUDA_ERROR_NOT_FOUND as u32,
            message: format!(
                "its library libcuda has no {name}; a driver for CUDA 12.0 or later is needed"
            ),
        }),
    }
}

/// An error of the driver, with what was tried.
fn driver(doing: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| Error::Driver {
        doing,
        code: error.0 as u32,
        message: error.error_string().map_or_else(
            |_| format!("{:?}", error.0),
            |message| message.to_string_lossy().into_owned(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::FUNCTIONS;

    /// The simulated driver has what is called and no more, or its tests would not pass.
    #[test]
    fn functions_are_those_of_the_simulated_driver() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/simt-driver/src/lib.rs");
        let source = std::fs::read_to_string(path).unwrap();
        let mut there: Vec<&str> = source
            .split("fn ")
            .filter_map(|rest| rest.split_once('(').map(|(name, _)| name))
            .filter(|name| name.starts_with("cu") && !name.contains(' '))
            // Candle's own kernels are launched by it.
            .filter(|&name| name != "cuLaunchKernel")
            .collect();
        there.sort_unstable();
        assert_eq!(there, FUNCTIONS);
    }
}
