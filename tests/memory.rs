//! The fused call takes memory for each token and each thread, not for each logit.

mod counting_allocator;

use atkd::{Batch, Logits, LogitsMut, Objective, cpu};

/// Bytes at the peak of one call beyond what there was before it.
fn peak(tokens: usize, vocab: usize, in_place: bool) -> usize {
    let teacher: Vec<f32> = (0..tokens * vocab).map(|i| (i * 7 % 31) as f32 * 0.1).collect();
    let mut student: Vec<f32> = (0..tokens * vocab).map(|i| (i * 11 % 29) as f32 * 0.1).collect();
    let mut gradient = vec![0.0_f32; tokens * vocab];
    let labels: Vec<i64> = (0..tokens).map(|i| (i % vocab) as i64).collect();
    let batch = Batch::new(Logits::new(&teacher, tokens, vocab).unwrap(), &labels).unwrap();
    let objective = Objective::default();
    let mut call = || {
        if in_place {
            let student = LogitsMut::new(&mut student, tokens, vocab).unwrap();
            cpu::forward_backward_in_place(&objective, &batch, student).unwrap();
        } else {
            let student = Logits::new(&student, tokens, vocab).unwrap();
            let gradient = LogitsMut::new(&mut gradient, tokens, vocab).unwrap();
            cpu::forward_backward(&objective, &batch, student, gradient).unwrap();
        }
    };
    call();
    counting_allocator::peak(call)
}

#[test]
fn memory_is_per_token_and_per_thread() {
    let threads = rayon::current_num_threads();
    for in_place in [false, true] {
        for (tokens, vocab) in [(64, 4096), (512, 4096), (64, 32000), (4096, 512)] {
            let peak = peak(tokens, vocab, in_place);
            let allowed = 290 * tokens + threads * (8 * vocab + 40_000) + 10_000;
            println!("{tokens} x {vocab}: {peak} bytes, allowed {allowed}");
            assert!(peak <= allowed, "{tokens} x {vocab}: {peak} bytes, allowed {allowed}");
        }
    }
}
