//! The threads of a call: the caller, who can do all of the work alone, and helpers from a pool, if they come in time.

use std::any::Any;
use std::panic::{self, AssertUnwindSafe};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// The calling thread, and all but one of a pool's, which is rayon's current pool if none is given.
///
/// The caller works rather than waits: it has the data that a caller's caches hold, and a thread that is
/// woken while another sleeps may find itself on the same core as a third. It can do all of the work by itself. Those
/// of the pool that come while there is some help it and are waited for; those that come too late find the [`Door`]
/// closed, and nobody waits for them, whatever keeps them busy.
///
/// In the child of a fork the helpers are of a pool that is made there: see [`forked`].
#[derive(Clone, Copy, Default)]
pub struct Threads<'a>(pub Option<&'a ThreadPool>);

impl<'a> Threads<'a> {
    /// How many threads work, the caller's included, and the pool of the others, rayon's current one if `None`.
    fn threads(self) -> (usize, Option<&'a ThreadPool>) {
        if !forked() {
            let threads =
                self.0.map_or_else(rayon::current_num_threads, ThreadPool::current_num_threads);
            return (threads, self.0);
        }
        match pool_of_child() {
            Some(pool) => (self.0.unwrap_or(pool).current_num_threads(), Some(pool)),
            None => (1, None),
        }
    }

    /// Does `work` on every item, and returns the results in the items' order. Each thread makes itself one `S`.
    pub fn map<T: Send, S, R: Send>(
        self,
        items: Vec<T>,
        start: impl Fn() -> S + Sync,
        work: impl Fn(&mut S, T) -> R + Sync,
    ) -> Vec<R> {
        let count = items.len();
        let (threads, pool) = self.threads();
        let waiting = Mutex::new(items.into_iter().enumerate());
        let done = Mutex::new(Vec::from_iter((0..count).map(|_| None)));
        let take = || {
            let mut waiting = lock(&waiting);
            // Less and less, so that all end at about the same time.
            let share = waiting.len().div_ceil(4 * threads);
            waiting.by_ref().take(share).collect::<Vec<_>>()
        };
        let run = || {
            let mut own = None;
            loop {
                let taken = take();
                if taken.is_empty() {
                    break;
                }
                let own = own.get_or_insert_with(&start);
                let work = |(index, item)| (index, work(own, item));
                let results: Vec<_> = taken.into_iter().map(work).collect();
                let mut done = lock(&done);
                results.into_iter().for_each(|(index, result)| done[index] = Some(result));
            }
        };
        run_beside(pool, threads.min(count).saturating_sub(1), &run);
        let done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.into_iter().map(|result| result.expect("every item was taken")).collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `job` on the calling thread and on up to `helpers` others, each from its beginning to its end. A panic of any of
/// them is the caller's.
fn run_beside(pool: Option<&ThreadPool>, helpers: usize, job: &(dyn Fn() + Sync)) {
    if helpers == 0 {
        return job();
    }
    // SAFETY: only the lifetime changes. The job is called only behind the door, which is closed and empty before this
    // function returns or unwinds, while the borrow lasts: `Closes` does that, whose drop nothing comes before.
    let job_for_helpers =
        unsafe { std::mem::transmute::<&(dyn Fn() + Sync), &'static (dyn Fn() + Sync)>(job) };
    let door = Arc::new(Door {
        job: Job(job_for_helpers),
        inside: Mutex::new(Inside { open: true, threads: 0, panic: None }),
        left: Condvar::new(),
    });
    let closes = Closes(&door);
    let first = {
        let door = door.clone();
        move || door.help(helpers)
    };
    match pool {
        Some(pool) => pool.spawn(first),
        None => rayon::spawn(first),
    }
    job();
    drop(closes);
    let panic = lock(&door.inside).panic.take();
    if let Some(panic) = panic {
        panic::resume_unwind(panic);
    }
}

/// Helpers pass it to get to the job. It outlives the job, for those that come late.
struct Door {
    job: Job,
    inside: Mutex<Inside>,
    /// A helper has left.
    left: Condvar,
}

struct Inside {
    open: bool,
    threads: usize,
    /// The payload of the first helper that panicked.
    panic: Option<Box<dyn Any + Send>>,
}

/// Valid while the door is open or a thread is inside.
struct Job(*const (dyn Fn() + Sync));

// SAFETY: it points to what is `Sync`, and so may be used by any thread.
unsafe impl Send for Job {}
// SAFETY: likewise.
unsafe impl Sync for Job {}

impl Door {
    /// A thread of the pool helps the caller, if it comes in time. It calls the other helpers too, by halves:
    /// no more than one task of a call waits in a pool that is busy, and the caller wakes one thread alone.
    fn help(self: Arc<Self>, helpers: usize) {
        {
            let mut inside = lock(&self.inside);
            if !inside.open {
                return;
            }
            inside.threads += 1;
        }
        let result = panic::catch_unwind(AssertUnwindSafe(|| {
            let others = helpers - 1;
            for share in [others / 2, others.div_ceil(2)] {
                if share > 0 {
                    let door = self.clone();
                    rayon::spawn(move || door.help(share));
                }
            }
            // SAFETY: this thread is inside, and it came through an open door.
            unsafe { (*self.job.0)() }
        }));
        let mut inside = lock(&self.inside);
        inside.threads -= 1;
        inside.panic = inside.panic.take().or(result.err());
        // The caller may go on as soon as the lock is free, but the door stays for as long as this thread has it.
        self.left.notify_one();
    }
}

/// Closes the door and waits until nobody is inside.
struct Closes<'a>(&'a Door);

impl Drop for Closes<'_> {
    fn drop(&mut self) {
        let mut inside = lock(&self.0.inside);
        inside.open = false;
        while inside.threads > 0 {
            inside = self.0.left.wait(inside).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// True in a fork of the process that made the first call. The pools that were there have no threads here,
/// and locks that those held stay locked: none of these pools may be asked for help.
fn forked() -> bool {
    static FIRST: AtomicU32 = AtomicU32::new(0);
    let process = std::process::id();
    let before = FIRST.compare_exchange(0, process, Ordering::Relaxed, Ordering::Relaxed);
    before.is_err_and(|first| first != process)
}

/// The pool of a fork's child, made when it is first needed; `None` if no threads can be started. No lock is
/// involved: another thread might have held it when the process forked.
fn pool_of_child() -> Option<&'static ThreadPool> {
    static POOL: AtomicPtr<(u32, ThreadPool)> = AtomicPtr::new(null_mut());
    let process = std::process::id();
    let known = POOL.load(Ordering::Acquire);
    // SAFETY: it is null or from the box below, which is never freed.
    if let Some((of, pool)) = unsafe { known.as_ref() }
        && *of == process
    {
        return Some(pool);
    }
    let made = Box::into_raw(Box::new((process, ThreadPoolBuilder::new().build().ok()?)));
    let pool = match POOL.compare_exchange(known, made, Ordering::AcqRel, Ordering::Acquire) {
        // A parent's stays: dropping it would wake threads that are not here.
        Ok(_) => made,
        Err(other) => {
            // SAFETY: nobody else has seen it.
            drop(unsafe { Box::from_raw(made) });
            other
        }
    };
    // SAFETY: as above.
    Some(unsafe { &(*pool).1 })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::Threads;

    #[test]
    fn results_are_in_the_order_of_the_items() {
        for threads in [1, 2, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for count in [0, 1, 2, 9, 1000] {
                let squares = |threads: Threads| {
                    threads.map((0..count).collect(), || (), |(), item: u64| item * item)
                };
                let expected: Vec<u64> = (0..count).map(|item| item * item).collect();
                assert_eq!(squares(Threads(Some(&pool))), expected);
                assert_eq!(pool.install(|| squares(Threads(None))), expected);
                assert_eq!(pool.install(|| squares(Threads(Some(&pool)))), expected);
            }
        }
    }

    /// All of the pool's threads wait for something that comes after the call. When they come to it, what it borrowed
    /// is gone.
    #[test]
    fn a_caller_waits_for_nobody_who_has_not_started() {
        let (ended, end) = channel();
        let caller = std::thread::spawn(move || {
            for threads in [1, 2, 5] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut releases = Vec::new();
                for _ in 0..threads {
                    let (release, released) = channel::<()>();
                    pool.spawn(move || released.recv().unwrap());
                    releases.push(release);
                }
                let here = std::thread::current().id();
                let items = vec![String::from("an item"); 50];
                let work = |(): &mut (), item: String| (item.len(), std::thread::current().id());
                let done = Threads(Some(&pool)).map(items, || (), work);
                assert_eq!(done, [(7, here); 50]);
                releases.iter().for_each(|release| release.send(()).unwrap());
                pool.broadcast(|_| ());
            }
            ended.send(()).unwrap();
        });
        let result = end.recv_timeout(Duration::from_secs(60));
        assert!(result.is_ok(), "the caller hangs or has panicked");
        caller.join().unwrap();
    }

    /// Every thread that can help is at it at once, and is waited for.
    #[test]
    fn helpers_come_and_are_waited_for() {
        const THREADS: usize = 5;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(THREADS).build().unwrap();
        let (inside, together) = (AtomicUsize::new(0), AtomicBool::new(false));
        let work = |(): &mut (), ()| {
            inside.fetch_add(1, Ordering::SeqCst);
            // The test hangs where no more than some of them come.
            while !together.load(Ordering::SeqCst) {
                together.fetch_or(inside.load(Ordering::SeqCst) == THREADS, Ordering::SeqCst);
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(10));
            inside.fetch_sub(1, Ordering::SeqCst);
        };
        Threads(Some(&pool)).map(vec![(); THREADS], || (), work);
        assert_eq!(inside.into_inner(), 0);
    }

    /// Callers of all kinds and the pool's own tasks, all at once; some of their items panic.
    #[test]
    fn many_callers_of_a_busy_pool() {
        let pool = &rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let rounds = if cfg!(miri) { 10 } else { 3000 };
        let caller = |number: usize| {
            for round in 0..rounds {
                let values: Vec<usize> = (0..round % 9).map(|i| i + number).collect();
                let expected: Vec<usize> = values.iter().map(|value| value + round).collect();
                let map = |panics: bool| {
                    let work = |own: &mut usize, &value: &usize| {
                        *own += 1;
                        assert!(!panics || value != number, "on purpose");
                        value + round
                    };
                    Threads(Some(pool)).map(values.iter().collect(), || 0, work)
                };
                if round % 5 == 0 {
                    pool.spawn(std::thread::yield_now);
                }
                if number == 1 {
                    assert_eq!(pool.install(|| map(false)), expected);
                } else {
                    assert_eq!(map(false), expected);
                }
                if round % 100 == 9 {
                    let map = std::panic::AssertUnwindSafe(|| map(!values.is_empty()));
                    assert!(std::panic::catch_unwind(map).is_err() || values.is_empty());
                }
            }
        };
        std::thread::scope(|scope| {
            let callers: Vec<_> =
                (0..4).map(|number| scope.spawn(move || caller(number))).collect();
            callers.into_iter().for_each(|caller| caller.join().unwrap());
        });
    }

    #[test]
    #[should_panic = "item 3"]
    fn a_panic_reaches_the_caller() {
        Threads(None).map((0..5).collect(), || (), |(), item| assert_ne!(item, 3, "item 3"));
    }

    /// The caller has nothing left to do when its helper panics.
    #[test]
    #[should_panic = "of a helper"]
    fn a_helper_s_panic_reaches_the_caller() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let (here, came) = (std::thread::current().id(), AtomicBool::new(false));
        let work = |(): &mut (), ()| {
            if std::thread::current().id() == here {
                while !came.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
            } else {
                came.store(true, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(10));
                panic!("of a helper");
            }
        };
        Threads(Some(&pool)).map(vec![(); 2], || (), work);
    }
}
