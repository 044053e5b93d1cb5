//! A call on the CPU beside other users of rayon's pool: it waits for none of their work.

mod common;

use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use common::Data;

const TOKENS: usize = 16;

/// Every thread of the default pool sleeps, and as many tasks wait behind.
#[test]
fn a_call_does_not_wait_for_others_tasks() {
    let data = Data::new(TOKENS);
    let expected = data.run(None);
    let sleep = Duration::from_secs(4);
    for _ in 0..2 * rayon::current_num_threads() {
        rayon::spawn(move || std::thread::sleep(sleep));
    }
    std::thread::sleep(Duration::from_millis(100));
    let start = Instant::now();
    assert_eq!(data.run(None), expected);
    let seconds = start.elapsed();
    assert!(seconds < sleep / 2, "a call of 16 x 1000 took {seconds:?}");
}

/// The tasks of a pool want a lock that the caller holds.
#[test]
fn a_caller_may_hold_what_others_tasks_want() {
    static LOCK: Mutex<()> = Mutex::new(());
    let (ended, end) = channel();
    std::thread::spawn(move || {
        let data = Data::new(TOKENS);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let expected = data.run(Some(&pool)).0;
        let held = LOCK.lock().unwrap();
        for _ in 0..10 {
            pool.spawn(|| drop(LOCK.lock()));
        }
        std::thread::sleep(Duration::from_millis(100));
        let losses: Vec<f32> = (0..100).map(|_| data.run(Some(&pool)).0).collect();
        drop(held);
        assert_eq!(losses, vec![expected; 100]);
        ended.send(()).unwrap();
    });
    assert!(end.recv_timeout(Duration::from_secs(60)).is_ok(), "a deadlock, or another loss");
}
