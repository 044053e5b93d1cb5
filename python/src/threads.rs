//! As many threads as torch uses.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

struct Pool {
    process: u32,
    threads: usize,
    pool: Arc<ThreadPool>,
}

/// Locked by who holds Python's lock, as who forks does: a child finds it free.
static LAST: Mutex<Option<Pool>> = Mutex::new(None);

/// A pool of `threads` threads: the last call's, if it had as many. In the child of a fork, where the last may be the
/// parent's, the call takes no more of it than their number.
pub fn pool(_: Python, threads: usize) -> PyResult<Arc<ThreadPool>> {
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(last) = &*last
        && last.threads == threads
    {
        return Ok(last.pool.clone());
    }
    let pool = ThreadPoolBuilder::new().num_threads(threads).build().map_err(|error| {
        PyRuntimeError::new_err(format!("{threads} threads cannot be started: {error}"))
    })?;
    let pool = Arc::new(pool);
    let process = std::process::id();
    let before = last.replace(Pool { process, threads, pool: pool.clone() });
    if let Some(before) = before
        && before.process != process
    {
        // A fork has copied the pool, but not its threads, which dropping it would wake.
        std::mem::forget(before);
    }
    Ok(pool)
}
