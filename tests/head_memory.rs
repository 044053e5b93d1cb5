//! Nothing behind a head is as large as the logits of all tokens.

mod counting_allocator;

use atkd::head::{self, Chunks, Gradients, Layer};
use atkd::{Objective, cpu::Session};
use half::bf16;

#[test]
fn memory_is_of_a_chunk() {
    let (tokens, vocab, features, chunk) = (512, 16_000, 32, 32);
    let numbers = |count: usize, scale: f32| -> Vec<bf16> {
        (0..count).map(|i| bf16::from_f32(scale * ((i * 7919 % 101) as f32 - 50.0))).collect()
    };
    let (hidden, weight) = (numbers(tokens * features, 0.02), numbers(vocab * features, 0.01));
    let (teacher_hidden, teacher_weight) =
        (numbers(tokens * features, 0.03), numbers(vocab * features, 0.02));
    let labels: Vec<i64> = (0..tokens).map(|i| (i * 31 % vocab) as i64).collect();
    let student = Layer::new(&hidden, &weight, features).unwrap();
    let teacher = Layer::new(&teacher_hidden, &teacher_weight, features).unwrap();
    let mut of_hidden = vec![bf16::ZERO; hidden.len()];
    let mut of_weight = vec![0.0; weight.len()];
    let mut call = |chunks| {
        let session = Session::begin(&Objective::default(), &labels, vocab).unwrap();
        let gradients = Gradients {
            hidden: Some((&mut of_hidden).into()),
            weight: Some(&mut of_weight),
            bias: None,
        };
        head::loss(session, &student, &teacher, chunks, gradients).unwrap()
    };
    let mut peak = |chunks| {
        call(chunks);
        counting_allocator::peak(|| {
            call(chunks);
        })
    };
    let of_chunk = 2 * 4 * chunk * vocab;
    // The float32 copies of a weight's tiles, the rows' scratch memory, and what is kept of each token.
    let beside = rayon::current_num_threads() * ((1 << 20) + 12 * vocab) + 600 * tokens;
    for chunks in [Chunks::Tokens(chunk), Chunks::Memory(of_chunk)] {
        let peak = peak(chunks);
        println!("{chunks:?}: {peak} bytes, {of_chunk} of them logits");
        assert!(peak <= of_chunk + beside, "{chunks:?}: {peak} bytes");
    }
    // The assertion would have seen them.
    assert!(of_chunk + beside < 2 * tokens * vocab);
}
