//! Tests from the inside: every instruction set, any number of threads, the memory taken.

mod divergences;

use super::exp::Exponent;
use super::math::{ForwardKl, TEACHER};
use super::rows::RowPass;
use super::tile::{Exponentials, Prefetch, Shift, Shifts};
use super::*;
use crate::{Coefficients, Reduction, Target, battery};

fn no_prefetch() -> [Prefetch; 2] {
    [Prefetch { address: std::ptr::null(), size: 0 }; 2]
}

/// exp over its whole range, against float64, in the vector loop and in its tail.
#[test]
fn exponentials_are_right_for_every_instruction_set() {
    for instructions in Instructions::available() {
        for inverse_temperature in [1.0, 0.5, 3.7] {
            let exponent = Exponent::new(inverse_temperature);
            let lowest = -87.3 / inverse_temperature;
            let x: Vec<f32> = (0..400_003)
                .map(|i| (2.0 + (lowest - 2.0) * f64::from(i) / 400_003.0) as f32)
                .collect();
            for guarded in [false, true] {
                let shift = Shift { value: 0.0, guarded };
                let shifts = Shifts { teacher: shift, student: shift, reference: 0.0 };
                let (mut p, mut q) = (vec![0.0; x.len()], vec![0.0; x.len()]);
                let mut out = Exponentials { kept: &mut p, student: &mut q, student_at_1: &mut [] };
                instructions.accumulate::<_, ForwardKl>(
                    [&x, &x],
                    &shifts,
                    exponent,
                    &mut out,
                    no_prefetch(),
                );
                assert_eq!(p, q);
                for (&x, &p) in x.iter().zip(&p) {
                    let exact = (f64::from(x) * inverse_temperature).exp();
                    // Relative: the polynomial and its roundings, then two roundings of the exponent.
                    let y = (f64::from(x) * inverse_temperature).abs();
                    let bound = (1.95e-7 + 1.2e-7 * y) * exact;
                    let error = (f64::from(p) - exact).abs();
                    assert!(
                        error <= bound,
                        "{} e^({x} * {inverse_temperature}) = {p}, off by {error:e}, allowed {bound:e}",
                        instructions.name(),
                    );
                }
            }
        }
    }
}

#[test]
fn guarded_exponentials_vanish_below_the_normal_range() {
    for instructions in Instructions::available() {
        let x: Vec<f32> = [f32::NEG_INFINITY, -1e38, -200.0, -104.0, -88.0, f32::NAN]
            .into_iter()
            .cycle()
            .take(42)
            .collect();
        let shift = Shift { value: 0.0, guarded: true };
        let shifts = Shifts { teacher: shift, student: shift, reference: 0.0 };
        let (mut p, mut q) = (vec![1.0; x.len()], vec![1.0; x.len()]);
        let mut out = Exponentials { kept: &mut p, student: &mut q, student_at_1: &mut [] };
        instructions.accumulate::<_, ForwardKl>(
            [&x, &x],
            &shifts,
            Exponent::new(1.0),
            &mut out,
            no_prefetch(),
        );
        for (x, p) in x.iter().zip(&p) {
            if x.is_nan() { assert!(p.is_nan()) } else { assert_eq!(*p, 0.0, "e^{x}") }
        }
    }
}

struct Case {
    vocab: usize,
    teacher: Vec<f32>,
    student: Vec<f32>,
    labels: Vec<i64>,
}

/// Logits whose row maxima climb from tile to tile, with now and then a mask.
fn case(tokens: usize, vocab: usize, seed: u64) -> Case {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut logits = |slope: f32| -> Vec<f32> {
        (0..tokens * vocab)
            .map(|i| {
                let climb = slope * (i % vocab) as f32 / vocab as f32;
                if random.u32(..5000) == 0 {
                    f32::NEG_INFINITY
                } else {
                    climb + 8.0 * (random.f32() + random.f32() - 1.0)
                }
            })
            .collect()
    };
    let teacher = logits(9.0);
    // The student rules out nothing, lest every loss be infinite.
    let student = logits(-5.0).into_iter().map(|z| z.max(-60.0)).collect();
    let labels =
        (0..tokens).map(|i| if i % 7 == 6 { -100 } else { (i * 7919 % vocab) as i64 }).collect();
    Case { vocab, teacher, student, labels }
}

impl Case {
    fn tokens(&self) -> usize {
        self.labels.len()
    }

    fn batch(&self) -> Batch<'_> {
        let teacher = Logits::new(&self.teacher, self.tokens(), self.vocab).unwrap();
        Batch::new(teacher, &self.labels).unwrap()
    }

    fn run(&self, instructions: Instructions, objective: &Objective) -> (Output, Vec<f32>) {
        let mut gradient = self.student.clone();
        let mut view = LogitsMut::new(&mut gradient, self.tokens(), self.vocab).unwrap();
        let rows = view.rows().into_iter().map(StudentRow::InPlace).collect();
        let workers = Workers { instructions: Some(instructions), ..Workers::default() };
        let output = compute(workers, objective, &self.batch(), rows).unwrap();
        (output, gradient)
    }
}

fn objectives() -> Vec<Objective> {
    let uneven = Coefficients::new(0.3, 1.7);
    vec![
        Objective::default(),
        Objective::kl(),
        Objective::decoupled(uneven, Coefficients::new(0.0, 0.4))
            .and_then(|o| o.with_ce_weight(0.5))
            .and_then(|o| o.with_temperature(2.5))
            .and_then(|o| o.with_reduction(Reduction::Sum))
            .unwrap(),
    ]
}

#[test]
fn every_instruction_set_passes_the_battery() {
    for instructions in Instructions::available() {
        let checks = battery::run(
            battery::Bounds::Cpu,
            |objective, batch, student, gradient| {
                let workers = Workers { instructions: Some(instructions), ..Workers::default() };
                forward_backward_by(workers, objective, batch, student, gradient)
            },
            |_| {},
        );
        for check in checks {
            assert!(check.passed(), "{} {check:?}", instructions.name());
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let case = case(29, 5003, 3);
    for objective in objectives() {
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| case.run(Instructions::named(None).unwrap(), &objective))
        };
        let alone = on(1);
        for threads in [2, 3, 8] {
            assert_eq!(on(threads), alone, "{threads} threads");
        }
    }
}

/// The exponentials of a tile are relative to the shift of the tile before, unless one is too large: at the start of a
/// tile, in a vector, and in the tail of the last.
#[test]
fn a_logit_far_above_all_others_is_seen_wherever_it_is() {
    let vocab = 2 * 1024 + 37;
    for instructions in Instructions::available() {
        for place in [0, 1, 600, 1023, 1024, 1500, 2047, 2048, vocab - 5, vocab - 1] {
            for height in [2.05, 3.0, 90.0, 1e4, f32::INFINITY] {
                let mut case = case(1, vocab, 5);
                case.labels = vec![900];
                case.teacher.iter_mut().for_each(|z| *z = z.clamp(-9.0, 1.0));
                case.teacher[place] = 1.0 + height;
                let batch = case.batch();
                let student = Logits::new(&case.student, 1, vocab).unwrap();
                let objective = Objective::kl();
                let workers = Workers { instructions: Some(instructions), ..Workers::default() };
                let output = forward_by(workers, &objective, &batch, student).unwrap();
                let exact = crate::reference::forward(&objective, &batch, student).unwrap();
                let (loss, exact) = (output.loss, exact.loss);
                let close = (loss - exact).abs() <= 2e-7 + 1e-6 * exact.abs();
                assert!(
                    close || (loss.is_nan() && exact.is_nan()),
                    "{} {height} at {place}: {loss}, but should be {exact}",
                    instructions.name(),
                );
            }
        }
    }
}

/// Among equal margins the first tokens' are the hard ones, whatever the student does.
#[test]
fn equal_teachers_tie() {
    let (tokens, vocab) = (6, 3000);
    for instructions in Instructions::available() {
        // Just above the largest exponentials that are in range.
        for height in [2.0, 2.03, 2.06, 2.09, 2.12] {
            let mut case = case(1, vocab, 6);
            case.teacher.iter_mut().for_each(|z| *z = z.clamp(-9.0, 1.0));
            case.teacher[2000] = height + case.teacher[..1024].iter().fold(0.0, |a, &b| b.max(a));
            case.teacher = case.teacher.repeat(tokens);
            case.student = case.student.repeat(tokens);
            case.student[2 * vocab + 2000] = 90.0;
            case.labels = vec![7; tokens];
            let (output, _) = case.run(instructions, &Objective::default());
            let hard: Vec<bool> = output.tokens.iter().map(|token| token.hard).collect();
            assert_eq!(hard, [true, true, true, false, false, false], "{height}");
            let margins = output.tokens.iter().map(|token| token.margin.to_bits());
            assert!(margins.clone().all(|m| Some(m) == margins.clone().next()), "{height}");
        }
    }
}

/// In place, the hard tokens are found in a pass over the teacher alone.
#[test]
fn margins_of_the_teacher_alone_are_the_same_bits() {
    for instructions in Instructions::available() {
        let pass = RowPass::new(Some(instructions), &Objective::default()).unwrap();
        for vocab in [2, 50, 1061, 5003] {
            let case = case(1, vocab, 8);
            let (teacher, student) = (&case.teacher, &case.student);
            let mut scratch = pass.scratch(vocab, true);
            for target in [0, vocab / 3, vocab - 1] {
                let state =
                    pass.state(ForwardKl, teacher.into(), student.into(), target, &mut scratch);
                let both = pass.margin_of(&state, TEACHER, teacher[target]);
                let alone = pass.margin(teacher.into(), target);
                assert_eq!(alone.to_bits(), both.to_bits(), "{} {vocab}", instructions.name());
            }
        }
    }
}

/// Large gradients are written by non-temporal stores: any alignment, any dtype, and the same bits.
#[test]
fn non_temporal_gradients_are_the_same() {
    use half::{bf16, f16};
    let case = case(5, 4999, 4);
    let (tokens, vocab) = (case.tokens(), case.vocab);
    macro_rules! check {
        ($element:ty, $convert:expr) => {{
            let student: Vec<$element> = case.student.iter().map(|&z| $convert(z)).collect();
            let student = Logits::new(&student, tokens, vocab).unwrap();
            let run = |offset: usize, non_temporal: bool| {
                let mut memory = vec![$convert(7.0); offset + tokens * vocab + 3];
                let rows = memory[offset..][..tokens * vocab]
                    .chunks_mut(vocab)
                    .enumerate()
                    .map(|(token, row)| StudentRow::Into {
                        logits: student.row(token),
                        gradient: row.into(),
                        non_temporal,
                    })
                    .collect();
                compute(Workers::default(), &Objective::default(), &case.batch(), rows).unwrap();
                assert!(memory[..offset].iter().all(|&z| z == $convert(7.0)), "written before");
                let end = offset + tokens * vocab;
                assert!(memory[end..].iter().all(|&z| z == $convert(7.0)), "written behind");
                memory[offset..end].to_vec()
            };
            let plain = run(0, false);
            for offset in [0, 1, 5, 16] {
                assert_eq!(run(offset, true), plain, "offset {offset}");
            }
        }};
    }
    check!(f32, |z| z);
    check!(f16, f16::from_f32);
    check!(bf16, bf16::from_f32);
}

#[test]
fn instructions_by_name() {
    let named = |name: &str| Instructions::named(Some(name.as_ref()));
    let available = Instructions::available();
    for (key, set) in ["portable", "avx2", "avx512"].into_iter().zip(&available) {
        assert_eq!(named(key).unwrap(), *set);
    }
    for widest in [named("").unwrap(), Instructions::named(None).unwrap()] {
        assert_eq!(widest, *available.last().unwrap());
    }
    let message = named("AVX9").unwrap_err().to_string();
    assert!(message.starts_with("ATKD_INSTRUCTIONS is \"AVX9\""), "{message}");
    assert!(message.contains("this machine has portable"), "{message}");
}

/// The loss, and the gradient's rows, of one call on the instructions given; and the exact ones.
struct Compared {
    output: Output,
    gradient: Vec<f32>,
    exact: Output,
    exact_gradient: Vec<f64>,
}

impl Case {
    fn compare(&self, instructions: Instructions, objective: &Objective) -> Compared {
        let (output, gradient) = self.run(instructions, objective);
        let student = Logits::new(&self.student, self.tokens(), self.vocab).unwrap();
        let (exact, exact_gradient) =
            crate::reference::forward_backward(objective, &self.batch(), student).unwrap();
        Compared { output, gradient, exact, exact_gradient }
    }
}

/// Teachers of standard deviation 3, and students that differ from them by `difference` of it.
fn close(tokens: usize, vocab: usize, difference: f32, seed: u64) -> Case {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut normal = || (0..12).map(|_| random.f32() - 0.5).sum::<f32>();
    let teacher: Vec<f32> = (0..tokens * vocab).map(|_| 3.0 * normal()).collect();
    let student = teacher.iter().map(|z| z + difference * normal()).collect();
    let labels = (0..tokens).map(|_| random.i64(0..vocab as i64)).collect();
    Case { vocab, teacher, student, labels }
}

/// A teacher that is sure of another token than the label, and a student that agrees: the gradient is a
/// difference of two probabilities near 1.
#[test]
fn gradients_of_sure_teachers_are_within_their_bound() {
    for instructions in Instructions::available() {
        for (vocab, tokens) in [(17, 2000), (257, 1500), (1000, 1500), (5003, 100)] {
            let mut random = fastrand::Rng::with_seed(vocab as u64);
            let mut case = close(tokens, vocab, 0.0, 1);
            for (token, (a, b)) in
                case.teacher.chunks_mut(vocab).zip(case.student.chunks_mut(vocab)).enumerate()
            {
                a.iter_mut().for_each(|z| *z = 4.0 * random.f32() - 2.0);
                let label = case.labels[token] as usize;
                a[(label + random.usize(1..vocab)) % vocab] = 6.0 + 14.0 * random.f32();
                b.iter_mut().zip(&*a).for_each(|(b, a)| *b = a + random.f32() - 0.5);
            }
            let objective = Objective::kl().with_reduction(Reduction::Sum).unwrap();
            let Compared { gradient, exact_gradient, .. } = case.compare(instructions, &objective);
            for (row, exact) in gradient.chunks(vocab).zip(exact_gradient.chunks(vocab)) {
                let largest = exact.iter().fold(0.0_f64, |largest, g| largest.max(g.abs()));
                for (g, exact) in row.iter().zip(exact) {
                    let error = (f64::from(*g) - exact).abs() / (1e-6 * largest + 5e-7);
                    let name = instructions.name();
                    assert!(error <= 1.0, "{name}, V = {vocab}: {g:e}, exactly {exact:e}: {error}");
                }
            }
        }
    }
}

/// A student close to its teacher: the gradient keeps what float32 logits tell of the difference, and the mean
/// over many tokens loses the error of each, which is as often below as above.
#[test]
fn close_models_are_told_apart() {
    const TOKENS: usize = 1000;
    for instructions in Instructions::available() {
        let name = instructions.name();
        for (difference, gradient_error) in [(1e-1, 2e-6), (1e-2, 2e-5), (1e-3, 1e-4), (1e-4, 1e-3)]
        {
            let case = close(TOKENS, 1000, difference, 3);
            let c = case.compare(instructions, &Objective::kl());
            let squares = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
            let pairs = c.gradient.iter().zip(&c.exact_gradient);
            let error = squares(&mut pairs.map(|(g, exact)| f64::from(*g) - exact))
                / squares(&mut c.exact_gradient.iter().copied());
            assert!(error <= gradient_error, "{name}, {difference}: gradient off by {error:e}");
            let (dkd, exact) = (c.output.summary().mean_dkd, c.exact.summary().mean_dkd);
            let error = (dkd - exact).abs();
            let allowed = 2e-7 / (TOKENS as f64).sqrt() + 1e-6 * exact;
            assert!(error <= allowed, "{name}, {difference}: {dkd:e}, exactly {exact:e}");
        }
    }
}

/// A call that is given a mask or margins, in place or not, gives what one does that selects by itself.
#[test]
fn a_selection_apart_from_the_loss() {
    let (tokens, vocab) = (50, 301);
    let Case { teacher, student, mut labels, .. } = case(tokens, vocab, 12);
    labels[7] = -100;
    labels[40] = -100;
    let view = |logits| Logits::new(logits, tokens, vocab).unwrap();
    let batch = Batch::new(view(&teacher[..]), &labels).unwrap();
    for target in [Target::Label, Target::Teacher] {
        let objective = Objective::default().with_target(target).with_temperature(1.5).unwrap();
        let run = |objective: &Objective, batch: &Batch| {
            let mut gradient = vec![0_f32; tokens * vocab];
            let to = LogitsMut::new(&mut gradient, tokens, vocab).unwrap();
            let output = forward_backward(objective, batch, view(&student[..]), to).unwrap();
            let mut in_place = student.clone();
            let to = LogitsMut::new(&mut in_place, tokens, vocab).unwrap();
            assert_eq!(forward_backward_in_place(objective, batch, to).unwrap(), output);
            assert_eq!(in_place, gradient);
            (output, gradient)
        };
        let expected = run(&objective, &batch);
        let margins = teacher_margins(&objective, &batch).unwrap();
        let in_call = expected.0.tokens.iter().map(|token| token.margin as f32);
        assert_eq!(margins, in_call.collect::<Vec<_>>());
        let valid: Vec<bool> = labels.iter().map(|&label| label != -100).collect();
        let hard = crate::select_hard(&margins, Some(&valid), 0.5, None).unwrap();
        assert_eq!(hard, expected.0.tokens.iter().map(|token| token.hard).collect::<Vec<_>>());
        assert!(run(&objective, &batch.with_margins(&margins).unwrap()) == expected);
        let unused = objective.with_hard_ratio(1.0).unwrap();
        assert!(run(&unused, &batch.with_hard(&hard).unwrap()) == expected);
    }
    let error = batch.with_hard(&[true; 3]).unwrap_err();
    assert!(error.to_string().contains("3 values of the mask of hard tokens"), "{error}");
    let error = batch.with_margins(&[1.0; 3]).unwrap_err();
    assert_eq!(error, Error::MarginCount { margins: 3, tokens });
}
