//! The functions of NCCL that atkd calls, for ranks that are threads of one process, on one device or several.
//!
//! The ranks of a call meet on the host, and each queues on its stream what NCCL's kernel would do: it waits for what the
//! others' streams have been given before, copies their memory, and waits for their copies of its own.

use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, PoisonError};

use atkd::cuda::cudarc::nccl::sys::ncclResult_t::{self, *};
use atkd::cuda::cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclDataType_t, ncclUniqueId};

use crate::device::{Done, Work};
use crate::{DRIVER, count};

type Answer<T = ()> = Result<T, ncclResult_t>;

/// The part of a meeting that a rank brings.
#[derive(Clone, Copy)]
struct Part {
    /// The memory that it sends.
    from: usize,
    bytes: usize,
    /// Its stream, up to here.
    done: Done,
}

/// The ranks of a communicator, of which each has come to so many meetings.
#[derive(Default)]
struct Group {
    parts: Vec<Option<Part>>,
    /// The parts of the last meeting.
    met: Option<Arc<[Part]>>,
    /// Ranks that have not taken that yet.
    leaving: usize,
}

static GROUPS: LazyLock<Mutex<HashMap<[c_char; 128], Group>>> = LazyLock::new(Mutex::default);
static CHANGED: Condvar = Condvar::new();

/// A rank of a communicator.
struct Rank {
    id: [c_char; 128],
    rank: usize,
    size: usize,
}

impl Rank {
    /// Waits for all ranks. Returns what each has brought.
    fn meet(&self, part: Part) -> Arc<[Part]> {
        let mut groups = GROUPS.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let group = groups.entry(self.id).or_default();
            if group.leaving == 0 {
                break;
            }
            groups = CHANGED.wait(groups).unwrap_or_else(PoisonError::into_inner);
        }
        let group = groups.entry(self.id).or_default();
        group.parts.resize(self.size, None);
        group.parts[self.rank] = Some(part);
        if group.parts.iter().all(Option::is_some) {
            group.met = Some(group.parts.drain(..).flatten().collect());
            group.leaving = self.size;
            CHANGED.notify_all();
        }
        loop {
            let group = groups.entry(self.id).or_default();
            if let Some(met) = group.met.clone().filter(|_| group.leaving > 0) {
                group.leaving -= 1;
                if group.leaving == 0 {
                    group.met = None;
                }
                CHANGED.notify_all();
                return met;
            }
            groups = CHANGED.wait(groups).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

macro_rules! nccl {
    ($(fn $name:ident($($argument:ident: $type:ty),*) $body:block)+) => {
        $(
            /// # Safety
            /// The arguments are what the library's documentation asks for.
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name($($argument: $type),*) -> ncclResult_t {
                let answer = || -> Answer {
                    // SAFETY: the caller's objects and values are what the library's documentation asks for.
                    unsafe { $body }
                };
                count(stringify!($name));
                answer().err().unwrap_or(ncclSuccess)
            }
        )+
    };
}

nccl! {
    fn ncclGetUniqueId(to: *mut ncclUniqueId) {
        static IDS: AtomicU64 = AtomicU64::new(1);
        let mut internal = [0; 128];
        for (i, byte) in IDS.fetch_add(1, Ordering::Relaxed).to_le_bytes().into_iter().enumerate() {
            internal[i] = byte as c_char;
        }
        to.write(ncclUniqueId { internal });
        Ok(())
    }

    fn ncclCommInitRank(to: *mut ncclComm_t, size: c_int, id: ncclUniqueId, rank: c_int) {
        if !(0..size).contains(&rank) {
            return Err(ncclInvalidArgument);
        }
        let own = Rank { id: id.internal, rank: rank as usize, size: size as usize };
        own.meet(Part { from: 0, bytes: 0, done: Done { stream: 0, works: 0 } });
        to.write(Box::into_raw(Box::new(own)).cast());
        Ok(())
    }

    fn ncclCommAbort(comm: ncclComm_t) {
        drop(Box::from_raw(comm.cast::<Rank>()));
        Ok(())
    }

    fn ncclAllGather(
        from: *const c_void,
        to: *mut c_void,
        elements: usize,
        dtype: ncclDataType_t,
        comm: ncclComm_t,
        stream: cudaStream_t
    ) {
        let comm = comm.cast::<Rank>().as_ref().ok_or(ncclInvalidArgument)?;
        if dtype != ncclDataType_t::ncclUint8 {
            return Err(ncclInvalidArgument);
        }
        let refused = |_| ncclInvalidArgument;
        let (from, to) = (from as usize, to as usize);
        let (id, done) = {
            let driver = &mut *DRIVER.lock().unwrap_or_else(PoisonError::into_inner);
            driver.range(from as u64, elements).map_err(refused)?;
            driver.range(to as u64, elements * comm.size).map_err(refused)?;
            let id = driver.stream(stream.cast()).map_err(refused)?;
            (id, Done { stream: id, works: driver.streams[&id].works })
        };
        let parts = comm.meet(Part { from, bytes: elements, done });
        // NCCL would hang, or write where it must not.
        if parts.iter().any(|part| part.bytes != elements) {
            return Err(ncclInvalidUsage);
        }
        let copied = {
            let driver = &mut *DRIVER.lock().unwrap_or_else(PoisonError::into_inner);
            for (rank, part) in parts.iter().enumerate() {
                let start = to + rank * elements;
                let copy = Work::Copy { to: start..start + elements, from: part.from };
                let waits = (rank != comm.rank).then_some(Work::Wait(part.done));
                for work in waits.into_iter().chain([copy]) {
                    driver.enqueue(id, work).map_err(refused)?;
                }
            }
            Done { stream: id, works: driver.streams[&id].works }
        };
        let parts = comm.meet(Part { from, bytes: elements, done: copied });
        let driver = &mut *DRIVER.lock().unwrap_or_else(PoisonError::into_inner);
        for part in parts.iter().filter(|part| part.done.stream != id) {
            driver.enqueue(id, Work::Wait(part.done)).map_err(refused)?;
        }
        Ok(())
    }
}
