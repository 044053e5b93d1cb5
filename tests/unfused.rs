//! The baseline of the benchmarks computes what it is compared with.

use atkd::{Batch, Logits, Objective, reference, unfused};

#[test]
fn it_is_the_same_loss() {
    let (tokens, vocab) = (9, 50);
    let mut random = fastrand::Rng::with_seed(2);
    let mut logits = || -> Vec<f32> { (0..tokens * vocab).map(|_| 3.0 * random.f32()).collect() };
    let (teacher, student) = (logits(), logits());
    let labels: Vec<usize> = (0..tokens).map(|i| i * 5).collect();
    let (loss, gradient) = unfused::forward_backward(&teacher, &student, &labels, vocab);

    let wide: Vec<i64> = labels.iter().map(|&j| j as i64).collect();
    let batch = Batch::new(Logits::new(&teacher, tokens, vocab).unwrap(), &wide).unwrap();
    let student = Logits::new(&student, tokens, vocab).unwrap();
    let (exact, exact_gradient) =
        reference::forward_backward(&Objective::default(), &batch, student).unwrap();
    // The epsilons, beside probabilities of about 1/50, cost about five digits less than float64.
    approx::assert_relative_eq!(f64::from(loss), exact.loss, max_relative = 1e-5);
    for (&g, exact) in gradient.iter().zip(exact_gradient) {
        approx::assert_abs_diff_eq!(f64::from(g), exact, epsilon = 1e-7);
    }
}
