//! A call on the CPU beside other users of rayon's pool: it waits for none of their work.

use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use atkd::call::{RawCall, RawLabels, RawLogits, RawOutput};
use atkd::cpu::raw;
use atkd::{Batch, Dtype, Logits, Objective, cpu};

const TOKENS: usize = 16;
const VOCAB: usize = 1000;

struct Data {
    teacher: Vec<f32>,
    student: Vec<f32>,
    labels: Vec<i64>,
}

impl Data {
    fn new() -> Self {
        let mut random = fastrand::Rng::with_seed(9);
        let mut logits = || (0..TOKENS * VOCAB).map(|_| 6.0 * random.f32()).collect();
        let (teacher, student) = (logits(), logits());
        Self { teacher, student, labels: (0..TOKENS as i64).collect() }
    }

    /// On rayon's current pool.
    fn loss(&self) -> f64 {
        let teacher = Logits::new(&self.teacher, TOKENS, VOCAB).unwrap();
        let student = Logits::new(&self.student, TOKENS, VOCAB).unwrap();
        let batch = Batch::new(teacher, &self.labels).unwrap();
        cpu::forward(&Objective::default(), &batch, student).unwrap().loss
    }

    fn loss_by(&self, pool: &rayon::ThreadPool) -> f32 {
        let logits = |logits: &[f32]| RawLogits {
            address: logits.as_ptr() as u64,
            dtype: Dtype::F32,
            strides: VOCAB.into(),
        };
        let call = RawCall {
            tokens: TOKENS,
            vocab: VOCAB,
            teacher: logits(&self.teacher),
            student: logits(&self.student),
            gradient: None,
            labels: Some(RawLabels::I64(self.labels.as_ptr() as u64)),
            sequences: None,
            margins: None,
            hard: None,
            upstream: None,
        };
        let mut loss = f32::NAN;
        let output = RawOutput { loss: Some(&raw mut loss as u64), ..RawOutput::default() };
        // SAFETY: the addresses are of arrays of the shapes given.
        unsafe { raw::run(Some(pool), &Objective::default(), &call, &output).unwrap() };
        loss
    }
}

/// Every thread of the default pool sleeps, and as many tasks wait behind.
#[test]
fn a_call_does_not_wait_for_others_tasks() {
    let data = Data::new();
    let expected = data.loss();
    let sleep = Duration::from_secs(4);
    for _ in 0..2 * rayon::current_num_threads() {
        rayon::spawn(move || std::thread::sleep(sleep));
    }
    std::thread::sleep(Duration::from_millis(100));
    let start = Instant::now();
    assert_eq!(data.loss(), expected);
    let seconds = start.elapsed();
    assert!(seconds < sleep / 2, "a call of 16 x 1000 took {seconds:?}");
}

/// The tasks of a pool want a lock that the caller holds.
#[test]
fn a_caller_may_hold_what_others_tasks_want() {
    static LOCK: Mutex<()> = Mutex::new(());
    let (ended, end) = channel();
    std::thread::spawn(move || {
        let data = Data::new();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let expected = data.loss_by(&pool);
        let held = LOCK.lock().unwrap();
        for _ in 0..10 {
            pool.spawn(|| drop(LOCK.lock()));
        }
        std::thread::sleep(Duration::from_millis(100));
        let losses: Vec<f32> = (0..100).map(|_| data.loss_by(&pool)).collect();
        drop(held);
        assert_eq!(losses, vec![expected; 100]);
        ended.send(()).unwrap();
    });
    assert!(end.recv_timeout(Duration::from_secs(60)).is_ok(), "a deadlock, or another loss");
}
