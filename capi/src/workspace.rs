//! The places where calls run: on threads, or on a CUDA device.

use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, PoisonError};

use atkd::Objective;
use atkd::call::{
    RawCall, RawEntropies, RawOutput, RawSelection, RawShard, RawSparseCall, RawStage, RawTeacher,
};
use atkd::cpu::raw;
use atkd::cuda::cudarc::driver::CudaStream;
use atkd::cuda::{self, Kernels, Workspace};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::ATKD_MAX_THREADS;
use crate::status::{ATKD_INVALID_ARGUMENT, Failure};

pub(crate) enum Place {
    /// On the pool that all of the process shares if there is none.
    Host(Option<Threads>),
    Cuda(Box<Mutex<Workspace>>),
}

/// A pool of the process that made it.
pub(crate) struct Threads {
    process: u32,
    pool: ManuallyDrop<ThreadPool>,
}

impl Drop for Threads {
    /// A fork has copied the pool, but not its threads, which its end would wake.
    fn drop(&mut self) {
        if self.process == std::process::id() {
            // SAFETY: it is not used again.
            unsafe { ManuallyDrop::drop(&mut self.pool) };
        }
    }
}

impl Place {
    pub(crate) fn host(threads: usize) -> Result<Self, Failure> {
        if threads == 0 {
            return Ok(Self::Host(None));
        }
        if threads > ATKD_MAX_THREADS {
            let allowed = "at most ATKD_MAX_THREADS (1024), or 0 for one a core";
            return Err(Failure::value("threads", threads, allowed));
        }
        let pool = ThreadPoolBuilder::new().num_threads(threads).build().map_err(|error| {
            let message = format!("{threads} threads cannot be started: {error}");
            Failure::new(ATKD_INVALID_ARGUMENT, message)
        })?;
        Ok(Self::Host(Some(Threads { process: std::process::id(), pool: ManuallyDrop::new(pool) })))
    }

    pub(crate) fn cuda(device: i32, max_tokens: usize) -> Result<Self, Failure> {
        let ordinal = usize::try_from(device)
            .map_err(|_| Failure::value("the device", device, "not negative"))?;
        let context = cuda::context(ordinal)?;
        let kernels = Kernels::load(&context)?;
        let stream = context.default_stream();
        let mut workspace = Workspace::new(&kernels, &stream, max_tokens)?;
        // Waits: other streams do not wait for this one, on which the memory was prepared.
        workspace.read_loss(&stream)?;
        Ok(Self::Cuda(Box::new(Mutex::new(workspace))))
    }

    /// # Safety
    /// The contract of [`raw::run`] holds, or that of [`Workspace::launch`].
    pub(crate) unsafe fn run(
        &self,
        objective: &Objective,
        call: &RawCall,
        output: &RawOutput,
        stream: *mut c_void,
    ) -> Result<(), Failure> {
        match self {
            // SAFETY: the caller's.
            Self::Host(threads) => unsafe {
                raw::run(threads.as_ref().map(|threads| &*threads.pool), objective, call, output)
            }?,
            Self::Cuda(workspace) => {
                let mut workspace = workspace.lock().unwrap_or_else(PoisonError::into_inner);
                // SAFETY: the caller's.
                unsafe {
                    let stream = wrap(&workspace, stream);
                    workspace.launch(&stream, objective, call, output)?;
                }
            }
        }
        Ok(())
    }

    /// # Safety
    /// The contract of [`raw::run_sparse`] holds, or that of [`Workspace::launch_sparse`].
    pub(crate) unsafe fn run_sparse(
        &self,
        objective: &Objective,
        call: &RawSparseCall,
        output: &RawOutput,
        stream: *mut c_void,
    ) -> Result<(), Failure> {
        match self {
            // SAFETY: the caller's.
            Self::Host(threads) => unsafe {
                let pool = threads.as_ref().map(|threads| &*threads.pool);
                raw::run_sparse(pool, objective, call, output)
            }?,
            Self::Cuda(workspace) => {
                let mut workspace = workspace.lock().unwrap_or_else(PoisonError::into_inner);
                // SAFETY: the caller's.
                unsafe {
                    let stream = wrap(&workspace, stream);
                    workspace.launch_sparse(&stream, objective, call, output)?;
                }
            }
        }
        Ok(())
    }

    /// # Safety
    /// The contract of [`raw::teacher_margins`] holds, or that of [`Workspace::launch_margins`].
    pub(crate) unsafe fn teacher_margins(
        &self,
        objective: &Objective,
        teacher: &RawTeacher,
        to: u64,
        stream: *mut c_void,
    ) -> Result<(), Failure> {
        match self {
            // SAFETY: the caller's.
            Self::Host(threads) => unsafe {
                let pool = threads.as_ref().map(|threads| &*threads.pool);
                raw::teacher_margins(pool, objective, teacher, to)
            }?,
            Self::Cuda(workspace) => {
                let mut workspace = workspace.lock().unwrap_or_else(PoisonError::into_inner);
                // SAFETY: the caller's.
                unsafe {
                    let stream = wrap(&workspace, stream);
                    workspace.launch_margins(&stream, objective, teacher, to)?;
                }
            }
        }
        Ok(())
    }

    /// # Safety
    /// The contract of [`raw::token_entropies`] holds, or that of [`Kernels::token_entropies_raw`].
    pub(crate) unsafe fn token_entropies(
        &self,
        of: &RawEntropies,
        stream: *mut c_void,
    ) -> Result<(), Failure> {
        match self {
            // SAFETY: the caller's.
            Self::Host(threads) => {
                unsafe { raw::token_entropies(threads.as_ref().map(|threads| &*threads.pool), of) }?
            }
            Self::Cuda(workspace) => {
                let workspace = workspace.lock().unwrap_or_else(PoisonError::into_inner);
                // SAFETY: the caller's.
                unsafe {
                    let stream = wrap(&workspace, stream);
                    workspace.kernels().token_entropies_raw(&stream, of)?;
                }
            }
        }
        Ok(())
    }

    /// # Safety
    /// The contract of [`raw::select_hard`] holds, or that of [`Workspace::launch_selection`].
    pub(crate) unsafe fn select_hard(
        &self,
        selection: &RawSelection,
        hard_ratio: f64,
        stream: *mut c_void,
    ) -> Result<(), Failure> {
        match self {
            // SAFETY: the caller's.
            Self::Host(_) => unsafe { raw::select_hard(selection, hard_ratio) }?,
            Self::Cuda(workspace) => {
                let mut workspace = workspace.lock().unwrap_or_else(PoisonError::into_inner);
                // SAFETY: the caller's.
                unsafe {
                    let stream = wrap(&workspace, stream);
                    workspace.launch_selection(&stream, selection, hard_ratio)?;
                }
            }
        }
        Ok(())
    }

    /// # Safety
    /// The contract of [`raw::shards::run`] holds, or that of [`Workspace::launch_shard`].
    pub(crate) unsafe fn run_shard(
        &self,
        objective: &Objective,
        shard: &RawShard,
        stage: &RawStage,
        stream: *mut c_void,
    ) -> Result<(), Failure> {
        match self {
            Self::Host(threads) => {
                let pool = threads.as_ref().map(|threads| &*threads.pool);
                // SAFETY: the caller's.
                unsafe { raw::shards::run(pool, objective, shard, stage) }?;
            }
            Self::Cuda(workspace) => {
                let mut workspace = workspace.lock().unwrap_or_else(PoisonError::into_inner);
                // SAFETY: the caller's.
                unsafe {
                    let stream = wrap(&workspace, stream);
                    workspace.launch_shard(&stream, objective, shard, stage)?;
                }
            }
        }
        Ok(())
    }

    /// # Safety
    /// `stream` is one of the workspace's device, or null.
    pub(crate) unsafe fn synchronize(&self, stream: *mut c_void) -> Result<(), Failure> {
        if let Self::Cuda(workspace) = self {
            let mut workspace = workspace.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: the caller's.
            let stream = unsafe { wrap(&workspace, stream) };
            workspace.read_loss(&stream)?;
        }
        Ok(())
    }
}

/// # Safety
/// `stream` is one of the workspace's device, or null, its default stream.
unsafe fn wrap(workspace: &Workspace, stream: *mut c_void) -> Arc<CudaStream> {
    // SAFETY: the caller's; the wrapper does not outlive the call.
    unsafe { workspace.kernels().context().wrap_borrowed_stream(stream.cast()) }
}
