//! The unfused baseline of the benchmarks on the device: see [`unfused`](crate::unfused).

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtrMut};

use super::{Kernels, RawCall, driver};
use crate::unfused::device::{Memory, launches};
use crate::{Error, Result};

/// Memory for the unfused loss: eight float32 tensors `[tokens, vocab]`.
#[derive(Debug)]
pub struct Unfused {
    kernels: Arc<Kernels>,
    memory: CudaSlice<u8>,
}

impl Unfused {
    /// # Errors
    /// If the device has not so much memory.
    pub fn new(
        kernels: &Arc<Kernels>,
        stream: &Arc<CudaStream>,
        tokens: usize,
        vocab: usize,
    ) -> Result<Self> {
        let memory = stream
            .alloc_zeros(Memory { tokens, vocab }.bytes())
            .map_err(driver("allocating the unfused loss's tensors"))?;
        Ok(Self { kernels: kernels.clone(), memory })
    }

    /// Enqueues the paper's ATKD and its gradient, step by step. Returns how many kernels that were.
    ///
    /// # Errors
    /// As [`Workspace::launch`](super::Workspace::launch).
    ///
    /// # Panics
    /// If there is no gradient, or labels are not 64 bits.
    ///
    /// # Safety
    /// As [`Workspace::launch`](super::Workspace::launch), with rows that are contiguous, and labels that
    /// are all valid.
    pub unsafe fn launch(&mut self, stream: &Arc<CudaStream>, call: &RawCall) -> Result<usize> {
        self.kernels.context().bind_to_thread().map_err(driver("using the context"))?;
        let needed = Memory { tokens: call.tokens, vocab: call.vocab }.bytes();
        if needed > self.memory.len() {
            let (what, capacity) = ("bytes of tensors", self.memory.len());
            return Err(Error::Workspace { what, needed, capacity });
        }
        let (address, _guard) = self.memory.device_ptr_mut(stream);
        let launches = launches(call, &self.kernels.device(), address)?;
        for launch in &launches {
            // Each by itself, as an eager framework launches: none is made ready beside the one before.
            // SAFETY: the caller vouches for the call's addresses, the layout for this memory's.
            unsafe { self.kernels.enqueue(stream, [*launch], None)? };
        }
        Ok(launches.len())
    }
}
