//! Calls on the CPU in the child of a fork, which has copies of the parent's pools but not their threads, and locks that
//! those threads held.
#![cfg(unix)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::Data;

const TOKENS: usize = 64;
/// Many, since a pool's threads hold locks only at a call's beginning and end.
const FORKS: usize = 100;

/// Returns true if `work` does so in a child within 20 seconds.
fn holds_in_child(work: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child calls nothing that needs the parent's other threads, which is what is tested, and ends without
    // destructors; a signal ends it if it hangs.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0, "this process cannot fork");
        if child == 0 {
            libc::alarm(20);
            let held = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            libc::_exit(if held.unwrap_or(false) { 0 } else { 1 });
        }
        let mut status = -1;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
    }
}

/// The children work with the pool that the parent works with, on one thread and, meanwhile, on two others.
fn children_work(pool: Option<&rayon::ThreadPool>) {
    let data = &Data::new(TOKENS);
    let expected = &data.run(pool);
    assert!(holds_in_child(|| data.run(pool) == *expected), "in a quiet process");
    // A grandchild, after its own parent's call, and one that uses whatever pool it makes.
    assert!(holds_in_child(|| {
        data.run(pool) == *expected && holds_in_child(|| data.run(pool) == *expected)
    }));
    assert!(holds_in_child(|| {
        let own = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        data.run(Some(&own)) == *expected && own.install(|| data.run(None)) == *expected
    }));
    let stop = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(data.run(pool), *expected);
                }
            });
        }
        let failed =
            (0..FORKS).find(|_| !holds_in_child(|| (0..3).all(|_| data.run(pool) == *expected)));
        stop.store(true, Ordering::Relaxed);
        assert_eq!(failed, None, "a child hangs or is wrong");
    });
}

#[test]
fn with_the_default_pool() {
    children_work(None);
}

#[test]
fn with_a_pool_given() {
    children_work(Some(&rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap()));
}

/// A child that several threads call in at once has one pool, whose threads work.
#[test]
fn threads_of_a_child() {
    let data = &Data::new(TOKENS);
    let expected = &data.run(None);
    assert!(holds_in_child(|| {
        std::thread::scope(|scope| {
            let callers: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| (0..50).all(|_| data.run(None) == *expected)))
                .collect();
            callers.into_iter().all(|caller| caller.join().unwrap())
        })
    }));
}
