//! The CUDA kernels for shards of the vocabulary, run by the simulator: against float64, and rank against rank.

mod exchanged;
mod simulated;
#[path = "simulated/shards.rs"]
mod stages;

use std::cell::Cell;

use atkd::shards::Shard;
use atkd::simt::{Extra, Simulation};
use atkd::{
    Batch, Divergence, Error, Logits, LogitsMut, Objective, Output, Reduction, Target, battery,
    reference,
};
use exchanged::DIVERGENCES;
use half::bf16;
use simulated::Input;
use stages::{Exchange, Shards};

/// Shards of uneven widths, some of them empty; so many in turn that types and settings, which repeat by threes and fives, meet
/// them all.
const WIDTHS: [&[usize]; 4] = [&[3, 1], &[2, 0, 5], &[3, 1, 0, 5, 2, 1, 4, 7], &[1]];

fn small(seed: u64) -> Simulation {
    Simulation { seed, block: 32, ..Simulation::default() }
}

#[test]
fn shards_pass_the_battery() {
    let turn = Cell::new(0);
    let backend = |objective: &Objective, batch: &Batch, student: Logits, mut to: LogitsMut| {
        let turn = turn.replace(turn.get() + 1);
        let simulation = Simulation { cluster: 1 + turn as u32 / 4 % 2, ..small(turn as u64) };
        Shards::new(simulation, objective, batch, student, WIDTHS[turn % 4]).run(&mut to)
    };
    let checks = battery::run(battery::Bounds::Kernels, backend, |_| {});
    battery::assert_all_pass(&checks);
}

/// The outcome of a call in shards, against the reference.
fn check(
    simulation: Simulation,
    objective: &Objective,
    input: &Input,
    widths: &[usize],
) -> (Output, Vec<f32>) {
    let (batch, student) = (input.batch(), input.view(&input.student));
    let mut gradient = vec![f32::NAN; student.elements().len()];
    let mut to = LogitsMut::new(&mut gradient, input.tokens, input.vocab).unwrap();
    let shards = Shards::new(simulation, objective, &batch, student, widths);
    let output = shards.run(&mut to).unwrap();
    let (exact, exact_gradient) = reference::forward_backward(objective, &batch, student).unwrap();
    let allowed = battery::compare::loss_within(exact.loss, 1.0);
    assert!((output.loss - exact.loss).abs() <= allowed, "{} {}", output.loss, exact.loss);
    for (found, exact) in gradient.iter().zip(exact_gradient) {
        assert!((f64::from(*found) - exact).abs() <= 1e-6, "{found}, but exactly {exact}");
    }
    (output, gradient)
}

/// The lowest token is the target where the largest logits of the teacher are equal, be they of one shard or of several; those of
/// the others are no targets.
#[test]
fn equal_arg_maxima_of_shards() {
    let mut input = Input::new(3, 300);
    let high = bf16::from_f32(12.0);
    for (token, equal) in [[20, 40, 290], [150, 160, 299], [80, 120, 240]].iter().enumerate() {
        equal.iter().for_each(|column| input.teacher[300 * token + column] = high);
    }
    for divergence in DIVERGENCES {
        for objective in [Objective::plain(), Objective::tkd(), Objective::dkd()] {
            let objective = objective.with_target(Target::Teacher);
            let objective = objective.with_divergence(divergence).unwrap();
            check(small(1), &objective, &input, &[1, 0, 1, 1]);
        }
    }
}

/// A divergence is infinite where one shard alone has what makes it so.
#[test]
fn tokens_that_a_model_rules_out() {
    let mut input = Input::new(4, 300);
    input.student[40] = bf16::NEG_INFINITY;
    input.teacher[300 + 140] = bf16::NEG_INFINITY;
    input.student[600 + 240] = bf16::NAN;
    // Its mass is none beside that of the other shards.
    input.student[900 + 40] = bf16::NEG_INFINITY;
    input.teacher[900 + 100..].iter_mut().for_each(|z| *z += bf16::from_f32(200.0));
    for divergence in DIVERGENCES {
        let objective = Objective::dkd().with_divergence(divergence).unwrap();
        let (batch, student) = (input.batch(), input.view(&input.student));
        let (exact, _) = reference::forward_backward(&objective, &batch, student).unwrap();
        let shards = Shards::new(small(2), &objective, &batch, student, &[1, 1, 1]);
        let output = shards.finish(&shards.exchange().unwrap(), Some(&[false; 4])).unwrap();
        for (found, exact) in output.tokens.iter().zip(&exact.tokens) {
            let [found, exact] = [found, exact].map(|token| token.dkd);
            let near = (found - exact).abs() <= 2e-6 * (1.0 + exact);
            assert!(
                near || found == exact || (found.is_nan() && exact.is_nan()),
                "{found} {exact}"
            );
        }
    }
}

#[test]
fn the_schedule_changes_no_bit() {
    let mut input = Input::new(3, 1003);
    input.labels[1] = -100;
    for divergence in DIVERGENCES {
        let objective = Objective::default().with_divergence(divergence).unwrap();
        for target in [Target::Label, Target::Teacher] {
            let objective = objective.with_target(target).with_ce_weight(0.4).unwrap();
            let run = |seed| check(small(seed), &objective, &input, &[2, 0, 5]);
            let first = run(0);
            for seed in 1..4 {
                assert_eq!(run(seed), first, "{divergence:?}, seed {seed}");
            }
        }
    }
}

/// There are as many blocks and clusters as an H200 gets.
#[test]
fn planned_shapes() {
    let input = Input::new(2, 60_001);
    let planned = Simulation { block: 1024, cluster: 8, ..Simulation::default() };
    for divergence in [Divergence::ForwardKl, Divergence::Jsd { beta: 0.5 }] {
        let objective = Objective::default().with_divergence(divergence).unwrap();
        check(planned, &objective, &input, &[3, 1]);
    }
}

/// More ranks than a warp has lanes.
#[test]
fn many_ranks() {
    let input = Input::new(4, 211);
    let widths: Vec<usize> = (0..75).map(|rank| rank % 3).collect();
    for divergence in DIVERGENCES {
        for target in [Target::Label, Target::Teacher] {
            let objective = Objective::plain().with_target(target);
            let objective = objective.with_divergence(divergence).unwrap();
            check(small(1), &objective, &input, &widths);
        }
    }
}

/// The gradient over the student's logits is that beside them; no rank writes another's columns.
#[test]
fn in_place() {
    let mut input = Input::new(4, 4000);
    input.labels[2] = -100;
    let (batch, student) = (input.batch(), input.view(&input.student));
    for divergence in DIVERGENCES {
        let objective = Objective::plain().with_divergence(divergence).unwrap();
        let shards = Shards::new(small(3), &objective, &batch, student, &[1, 3, 0, 2]);
        let exchange = shards.exchange().unwrap();
        let mut in_place = input.student.clone();
        let mut gradient = vec![bf16::NAN; in_place.len()];
        for rank in shards.ranks() {
            let range = shards.columns[rank].clone();
            let Some([teacher, _]) = shards.logits(rank) else { continue };
            let before = (gradient.clone(), in_place.clone());
            let mut view = LogitsMut::new(&mut gradient, input.tokens, input.vocab).unwrap();
            shards.gradient(rank, &exchange, None, &mut view).unwrap();
            let mut of = LogitsMut::new(&mut in_place, input.tokens, input.vocab).unwrap();
            let mut of = of.columns(range.clone()).unwrap();
            let (shard, view) = (shards.shard(rank, None).unwrap(), exchange.view());
            small(5).shard_gradient_in_place(&objective, &shard, &view, teacher, &mut of).unwrap();
            for i in 0..gradient.len() {
                if range.contains(&(i % input.vocab)) {
                    assert_eq!(gradient[i], in_place[i]);
                } else {
                    assert_eq!(gradient[i].to_bits(), before.0[i].to_bits());
                    assert_eq!(in_place[i], before.1[i]);
                }
            }
        }
    }
}

/// Two ranks of tokens, each of two ranks of the vocabulary: both have their part of the loss, and the gradient that the whole
/// call has.
#[test]
fn counts_of_all_ranks() {
    let mut input = Input::new(8, 500);
    input.labels[1] = -100;
    let atkd = Objective::default().with_ce_weight(0.3).unwrap();
    let hard: &[bool] = &[true, false, false, true, false, false, true, false];
    for objective in [atkd, atkd.with_reduction(Reduction::GroupMean).unwrap()] {
        let batch = input.batch().with_hard(hard).unwrap();
        let student = input.view(&input.student);
        let mut gradient = vec![f32::NAN; student.elements().len()];
        let mut to = LogitsMut::new(&mut gradient, 8, 500).unwrap();
        let whole =
            Shards::new(small(1), &objective, &batch, student, &[2, 1]).run(&mut to).unwrap();
        let mut loss = 0.0;
        for part in [0..3, 3..8] {
            let tokens = part.len();
            let of = |logits| Logits::new(logits, tokens, 500).unwrap();
            let elements = part.start * 500..part.end * 500;
            let batch =
                Batch::new(of(&input.teacher[elements.clone()]), &input.labels[part.clone()])
                    .and_then(|batch| batch.with_hard(&hard[part]))
                    .unwrap();
            let mut of_part = vec![f32::NAN; elements.len()];
            let mut to = LogitsMut::new(&mut of_part, tokens, 500).unwrap();
            let student = of(&input.student[elements.clone()]);
            let shards = Shards::new(small(2), &objective, &batch, student, &[2, 1]);
            let output = Shards { counts: Some([7, 3]), ..shards }.run(&mut to).unwrap();
            assert_eq!(of_part, gradient[elements]);
            loss += output.loss;
        }
        approx::assert_relative_eq!(loss, whole.loss, max_relative = 1e-12);
    }
}

#[test]
fn an_upstream_gradient_from_the_device() {
    let input = Input::new(5, 700);
    let (batch, student) = (input.batch(), input.view(&input.student));
    let run = |objective: &Objective, extra| {
        let mut gradient = vec![f32::NAN; student.elements().len()];
        let mut to = LogitsMut::new(&mut gradient, input.tokens, input.vocab).unwrap();
        let shards = Shards::new(small(0), objective, &batch, student, &[1, 2]);
        let output = Shards { extra, ..shards }.run(&mut to).unwrap();
        (output, gradient)
    };
    let host = Objective::default().with_upstream_gradient(-2.5).unwrap();
    let by_device = run(&Objective::default(), Extra { upstream: Some(-2.5) });
    assert_eq!(by_device, run(&host, Extra::default()));
}

/// No mask is needed where groups do not matter, and hard tokens are counted all the same.
#[test]
fn without_a_mask() {
    let input = Input::new(5, 300);
    let all_hard = Objective::default().with_hard_ratio(1.0).unwrap();
    let group_mean = all_hard.with_reduction(Reduction::GroupMean).unwrap();
    for (objective, hard) in [(Objective::kl(), 0), (all_hard, 5), (group_mean, 5)] {
        let (batch, student) = (input.batch(), input.view(&input.student));
        let shards = Shards::new(small(0), &objective, &batch, student, &[1, 2]);
        let output = shards.finish(&shards.exchange().unwrap(), None).unwrap();
        let (exact, _) = reference::forward_backward(&objective, &batch, student).unwrap();
        approx::assert_relative_eq!(output.loss, exact.loss, max_relative = 1e-6);
        assert_eq!(output.summary().hard_tokens, hard);
    }
}

/// A label beyond the whole vocabulary drops its token, whichever kernel meets it. The vocabulary is not the shard's.
#[test]
fn labels_out_of_range() {
    let mut input = Input::new(4, 100);
    let objective = Objective::default().with_divergence(Divergence::TotalVariation).unwrap();
    for label in [100, -1, i64::MAX] {
        input.labels[2] = label;
        let (batch, student) = (input.batch(), input.view(&input.student));
        let shards = Shards::new(small(0), &objective, &batch, student, &[1, 2]);
        let exchange = shards.exchange().unwrap();
        for rank in shards.ranks() {
            let (state, terms) =
                (exchange.states[4 * rank + 2], exchange.terms.as_ref().unwrap()[4 * rank + 2]);
            assert_eq!((state.target, state.teacher_sum, terms.teacher), (-1, 0.0, 0.0));
            assert_ne!(exchange.states[4 * rank + 1].teacher_sum, 0.0);
        }
        let margins = shards.margins(&exchange).unwrap();
        let nan: Vec<bool> = margins.iter().map(|margin| margin.is_nan()).collect();
        assert_eq!(nan, [false, false, true, false]);
        let error = shards.finish(&exchange, Some(&[false; 4])).unwrap_err();
        let expected = Error::DeviceLabel { token: 2, vocab: 100, ignore_index: -100 };
        assert_eq!(error, expected);
    }
}

/// Without the rank that has the target the token is NaN, and no other.
#[test]
fn a_target_that_no_rank_has() {
    let mut input = Input::new(3, 90);
    input.labels = vec![80, 5, 6];
    for divergence in DIVERGENCES {
        let objective = Objective::plain().with_divergence(divergence).unwrap();
        let (batch, student) = (input.batch(), input.view(&input.student));
        let shards = Shards::new(small(0), &objective, &batch, student, &[1, 1, 1]);
        let exchange = shards.exchange().unwrap();
        let terms = exchange.terms.map(|terms| terms[..6].to_vec());
        let two = Exchange { states: exchange.states[..6].to_vec(), terms, ..Exchange::default() };
        let shard = shards.shard(1, None).unwrap();
        let (output, _) = small(1).shard_finish(&objective, &shard, &two.view()).unwrap();
        let mut gradient = vec![0_f32; 3 * 90];
        let mut whole = LogitsMut::new(&mut gradient, 3, 90).unwrap();
        shards.gradient(1, &two, None, &mut whole).unwrap();
        for (token, row) in gradient.chunks(90).enumerate() {
            assert_eq!(output.tokens[token].loss.is_nan(), token == 0);
            assert!(row[30..60].iter().all(|g| g.is_nan() == (token == 0)));
        }
    }
}

#[test]
fn stages_without_what_they_need() {
    let input = Input::new(2, 90);
    let (batch, student) = (input.batch(), input.view(&input.student));
    let jsd = Objective::plain().with_divergence(Divergence::Jsd { beta: 0.5 }).unwrap();
    let run = |objective: &Objective, ranks: usize, terms: bool| {
        let shards = Shards::new(small(0), objective, &batch, student, &[1, 1]);
        let Exchange { mut states, terms: own, traffic } = shards.exchange().unwrap();
        states.truncate(2 * ranks);
        let exchange = Exchange { states, terms: own.filter(|_| terms), traffic };
        let shard = shards.shard(0, None).unwrap();
        small(0).shard_finish(objective, &shard, &exchange.view()).map(|_| ())
    };
    assert_eq!(run(&jsd, 2, true), Ok(()));
    assert_eq!(run(&jsd, 2, false), Err(Error::NoSweepTerms));
    assert_eq!(run(&jsd, 0, true), Err(Error::NoStates));
    assert_eq!(run(&Objective::default(), 2, true), Err(Error::NoHardTokens));
    let kl = Objective::kl();
    let shards = Shards::new(small(0), &kl, &batch, student, &[1, 1]);
    let (exchange, shard) = (shards.exchange().unwrap(), shards.shard(0, None).unwrap());
    let [teacher, student] = shards.logits(0).unwrap();
    let terms = small(0).shard_terms(&kl, &shard, &exchange.view(), teacher, student).map(|_| ());
    assert_eq!(terms, Err(Error::NoSecondSweep));
    let shard = Shard::new(&input.labels, 90, 46).unwrap();
    let states = small(0).shard_states(&kl, &shard, teacher, student).map(|_| ());
    assert_eq!(states, Err(Error::ShardColumns { first: 46, columns: 45, vocab: 90 }));
}

#[test]
fn what_is_exchanged_is_what_the_header_says() {
    exchanged::states_are_what_they_say(&small(7));
    exchanged::terms_are_what_they_say(&small(7));
}
