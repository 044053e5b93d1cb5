//! The CUDA kernels, run by the simulator: against float64, whatever the schedule.

mod simulated;

use std::cell::Cell;

use atkd::battery::Aligned;
use atkd::plan::RowKernel;
use atkd::simt::machine::Buffer;
use atkd::simt::{self, Extra, Simulation};
use atkd::{
    Batch, Error, Logits, LogitsMut, Objective, Output, Reduction, Strides, Target, battery, cpu,
    reference,
};
use half::{bf16, f16};
use simulated::{Input, bytes, counts, in_teams, pipelined, pipelined_by, preferring, streamed};

/// Each case by one of the simulations in turn.
fn pass_the_battery(simulations: &[Simulation]) {
    let turn = Cell::new(0);
    let backend = |objective: &Objective, batch: &Batch, student: Logits, mut to: LogitsMut| {
        let simulation = &simulations[turn.replace(turn.get() + 1) % simulations.len()];
        Ok(simulation.run(objective, batch, student, Some(&mut to), Extra::default())?.0)
    };
    let checks = battery::run(battery::Bounds::Kernels, backend, |_| {});
    battery::assert_all_pass(&checks);
}

#[test]
fn the_kernels_pass_the_battery() {
    pass_the_battery(&[Simulation::default()]);
}

#[test]
fn the_kernels_pass_the_battery_with_every_row_read_twice() {
    pass_the_battery(&[Simulation { seed: 1, ..preferring(RowKernel::Stream, 0) }]);
}

#[test]
fn the_kernels_pass_the_battery_with_rows_in_shared_memory() {
    pass_the_battery(&[
        Simulation { seed: 2, ..pipelined(1, 1) },
        Simulation { seed: 3, predicted_threshold: 0, ..pipelined(3, 2) },
        Simulation { seed: 4, ..pipelined_by(RowKernel::PipelinedWide, 2, 1) },
        // The fourth, so that types and settings, which repeat by threes and fives, meet them all.
        Simulation { seed: 5, ..pipelined_by(RowKernel::PipelinedWide, 1, 2) },
    ]);
}

#[test]
fn the_kernels_pass_the_battery_in_teams() {
    pass_the_battery(&[Simulation { seed: 4, block: 32, ..in_teams(4, 2) }]);
}

#[test]
fn the_schedule_changes_no_bit() {
    for (vocab, cluster) in [(1003, 1), (20_011, 1), (50_257, 4)] {
        let input = Input::new(3, vocab);
        for objective in [Objective::default(), Objective::default().with_target(Target::Teacher)] {
            for simulation in [
                streamed(32, cluster, 0),
                streamed(96, cluster, 0),
                pipelined(cluster, 1),
                pipelined(cluster + 1, 2),
                in_teams(2, 1),
                in_teams(4, 2),
                Simulation { block: 32, ..in_teams(32, 1) },
                Simulation::default(),
            ] {
                let run = |seed| {
                    let simulation = Simulation { seed, ..simulation };
                    let (output, gradient, _) = input.run(simulation, &objective, Extra::default());
                    (output, gradient)
                };
                let first = run(0);
                for seed in 1..5 {
                    assert_eq!(run(seed), first, "V = {vocab}, {simulation:?}, seed {seed}");
                }
            }
        }
    }
}

/// However many teams share the rows, an ignored one among them.
#[test]
fn teams_of_any_number() {
    let mut input = Input::new(9, 1003);
    input.labels[4] = -100;
    let objective = Objective::default().with_ce_weight(0.1).unwrap();
    for team in [2, 8, 32] {
        let run = |teams| {
            let simulation = Simulation { block: 32, ..in_teams(team, teams) };
            let (output, gradient, _) = input.run(simulation, &objective, Extra::default());
            (output, gradient)
        };
        let expected = run(9);
        input.check(&objective, &expected);
        for teams in [1, 2, 4] {
            assert_eq!(run(teams), expected, "{teams} teams of {team}");
        }
    }
}

/// Blocks and teams as the plan for a device without clusters has them.
#[test]
fn planned_teams() {
    let mut simulation = Simulation::default();
    simulation.device.pipelined_blocks = 0;
    simulation.device.pipelined_wide_blocks = 0;
    simulation.device.multiprocessors = 3;
    simulation.device.l2_bytes = 1;
    let mut input = Input::new(7, 20_011);
    input.labels[3] = -100;
    let (output, _, traffic) = input.run(simulation, &Objective::default(), Extra::default());
    let rows = "row_stream_bf16_bf16_bf16";
    assert_eq!(traffic[1].0, rows);
    // Each of 4 blocks of a team reads each row's label.
    assert_eq!(bytes(&traffic, rows, "labels").0, 7 * 4 * 64 * 8);
    let (expected, _, _) = input.run(in_teams(4, 1), &Objective::default(), Extra::default());
    assert_eq!(output, expected);
}

/// Blocks and clusters as the plan for an H200 has them, where rows are read twice.
#[test]
fn planned_shapes() {
    let planned = Simulation { block: 1024, cluster: 8, ..preferring(RowKernel::Stream, 0) };
    let mut input = Input::new(132, 60_001);
    // Only the first rows count; the plan is for all, of which clusters of 2 are more than half of the cache.
    input.labels[3..].fill(-100);
    let (output, gradient, traffic) = input.run(planned, &Objective::default(), Extra::default());
    assert_eq!(output.summary().hard_tokens, 2);
    input.check(&Objective::default(), &(output, gradient));
    let names: Vec<_> = traffic.iter().map(|(name, _)| *name).collect();
    let rows = "row_stream_bf16_bf16_bf16";
    assert_eq!(names, ["count_valid", rows, "select_hard", rows, "token_terms"]);
    // Each of 384 threads of each of 4 blocks of a cluster reads its row's label.
    let first = traffic.iter().find(|(name, _)| *name == rows).unwrap();
    let labels = first.1.iter().find(|buffer| buffer.name() == "labels").unwrap();
    assert_eq!(labels.read, 132 * 4 * 384 * 8);
}

#[test]
fn labels_of_32_bits_and_the_loss_alone() {
    let input = Input::new(5, 700);
    let narrow: Vec<i32> = input.labels.iter().map(|&label| label as i32).collect();
    let batch = Batch::new(input.view(&input.teacher), &narrow).unwrap();
    let student = input.view(&input.student);
    for simulation in [Simulation::default(), in_teams(2, 2)] {
        for objective in [Objective::default(), Objective::kl()] {
            let (expected, _, _) = input.run(simulation, &objective, Extra::default());
            let (output, traffic) =
                simulation.run(&objective, &batch, student, None, Extra::default()).unwrap();
            assert_eq!(output, expected);
            let written = |b: &Buffer| b.name() == "gradient";
            assert!(!traffic.iter().any(|(_, buffers)| buffers.iter().any(written)));
        }
    }
}

/// The gradient over the student's logits is the gradient beside them.
#[test]
fn in_place() {
    for (vocab, cluster) in [(33, 1), (12_301, 2)] {
        let input = Input::new(4, vocab);
        let objective = Objective::kl().with_ce_weight(0.5).unwrap();
        for simulation in [streamed(64, cluster, 0), pipelined(cluster + 1, 2), in_teams(4, 2)] {
            let simulation = |seed| Simulation { seed, ..simulation };
            let (output, gradient, _) = input.run(simulation(3), &objective, Extra::default());
            let mut student = input.student.clone();
            let mut view = LogitsMut::new(&mut student, input.tokens, vocab).unwrap();
            let (in_place, _) = simulation(4)
                .run_in_place(&objective, &input.batch(), &mut view, Extra::default())
                .unwrap();
            assert_eq!(in_place, output);
            assert_eq!(student, gradient);
        }
    }
}

/// Rows of `vocab` logits, so far apart, with NaN between them.
fn spread(logits: &[bf16], vocab: usize, row: usize) -> Vec<bf16> {
    let rows = logits.chunks(vocab);
    rows.flat_map(|of| of.iter().copied().chain(vec![bf16::NAN; row - vocab])).collect()
}

/// A float32 model beside one in half precision: rows with gaps, which start anywhere, and one that is ignored; with a
/// gradient, without, and in place.
#[test]
fn rows_of_two_types_on_chip() {
    let (tokens, vocab) = (4, 3001);
    let input = Input::new(tokens, vocab);
    let labels = [7, -100, 0, vocab as i64 - 1];
    // Alike in elements modulo those of 16 bytes, though not in bytes.
    let (wide_row, narrow_row) = (vocab + 4, vocab + 12);
    for wide_teacher in [true, false] {
        let (wide, narrow) = match wide_teacher {
            true => (&input.teacher, &input.student),
            false => (&input.student, &input.teacher),
        };
        let mut narrow: Aligned<bf16> = spread(narrow, vocab, narrow_row).into_iter().collect();
        let wide_of = spread(wide, vocab, wide_row).into_iter().map(|z| z.to_f32());
        let mut wide: Aligned<f32> = wide_of.collect();
        let simulation = pipelined_by(RowKernel::PipelinedWide, 2, 1);
        let objective = Objective::default().with_ce_weight(0.3).unwrap();
        let extra = Extra::default;

        let of_wide = Logits::strided(&wide[..], tokens, vocab, wide_row).unwrap();
        let of_narrow = Logits::strided(&narrow[..], tokens, vocab, narrow_row).unwrap();
        let (teacher, student) =
            if wide_teacher { (of_wide, of_narrow) } else { (of_narrow, of_wide) };
        let batch = Batch::new(teacher, &labels).unwrap();
        let (_, exact) = reference::forward_backward(&objective, &batch, student).unwrap();
        // The gradient's row starts where the student's does.
        let row = if wide_teacher { narrow_row } else { wide_row };
        let mut gradient: Aligned<f32> = vec![f32::NAN; tokens * row].into_iter().collect();
        let mut to = LogitsMut::strided(&mut gradient[..], tokens, vocab, row).unwrap();
        let (output, traffic) =
            simulation.run(&objective, &batch, student, Some(&mut to), extra()).unwrap();
        let types = if wide_teacher { "f32_bf16" } else { "bf16_f32" };
        let kernel = format!("row_pipelined_wide_{types}");
        assert!(traffic.iter().any(|(name, _)| *name == kernel), "{kernel}");
        for (found, exact) in gradient.chunks(row).zip(exact.chunks(vocab)) {
            for (&found, exact) in found.iter().zip(exact) {
                assert!((f64::from(found) - exact).abs() <= 1e-6, "{found}, but exactly {exact}");
            }
            assert!(found[vocab..].iter().all(|z| z.is_nan()));
        }
        let (alone, _) = simulation.run(&objective, &batch, student, None, extra()).unwrap();
        assert_eq!(alone, output);

        let before: Vec<f32> = gradient.to_vec();
        let after: Vec<f32> = if wide_teacher {
            let teacher = Logits::strided(&wide[..], tokens, vocab, wide_row).unwrap();
            let batch = Batch::new(teacher, &labels).unwrap();
            let mut student =
                LogitsMut::strided(&mut narrow[..], tokens, vocab, narrow_row).unwrap();
            simulation.run_in_place(&objective, &batch, &mut student, extra()).unwrap();
            narrow.iter().map(|z| z.to_f32()).collect()
        } else {
            let teacher = Logits::strided(&narrow[..], tokens, vocab, narrow_row).unwrap();
            let batch = Batch::new(teacher, &labels).unwrap();
            let mut student = LogitsMut::strided(&mut wide[..], tokens, vocab, wide_row).unwrap();
            simulation.run_in_place(&objective, &batch, &mut student, extra()).unwrap();
            wide.to_vec()
        };
        for (before, after) in before.iter().zip(&after).filter(|(before, _)| !before.is_nan()) {
            let rounded = if wide_teacher { bf16::from_f32(*before).to_f32() } else { *before };
            assert_eq!(*after, rounded);
        }
    }
}

/// A gradient in half precision of float32 logits by each kernel, of rows with gaps that start anywhere, alike or not, and
/// of one that is ignored.
#[test]
fn narrow_gradients() {
    let (tokens, vocab) = (4, 3001);
    let input = Input::new(tokens, vocab);
    let labels = [7, -100, 0, vocab as i64 - 1];
    let row = vocab + 4;
    let [wide_teacher, student] = [&input.teacher, &input.student].map(|logits| {
        spread(logits, vocab, row).iter().map(|z| z.to_f32()).collect::<Aligned<f32>>()
    });
    let narrow_teacher: Aligned<bf16> = spread(&input.teacher, vocab, row).into_iter().collect();
    let wide_teacher = Logits::strided(&wide_teacher[..], tokens, vocab, row).unwrap();
    let narrow_teacher = Logits::strided(&narrow_teacher[..], tokens, vocab, row).unwrap();
    let student = Logits::strided(&student[..], tokens, vocab, row).unwrap();
    let objective = Objective::default().with_ce_weight(0.3).unwrap();
    for (simulation, teacher, row, kernel) in [
        (Simulation::default(), wide_teacher, row, "row_pipelined_f32"),
        // Modulo 4 elements as the logits, not modulo 8.
        (Simulation::default(), wide_teacher, row + 4, "row_pipelined_f32"),
        (
            pipelined_by(RowKernel::PipelinedWide, 2, 1),
            wide_teacher,
            row + 4,
            "row_pipelined_wide_f32",
        ),
        (
            pipelined_by(RowKernel::PipelinedWide, 2, 1),
            narrow_teacher,
            row,
            "row_pipelined_wide_bf16_f32",
        ),
        (Simulation::default(), narrow_teacher, row + 4, "row_stream_bf16_f32"),
        (Simulation::default(), wide_teacher, row + 1, "row_stream_f32_f32"),
    ] {
        let batch = Batch::new(teacher, &labels).unwrap();
        let (_, exact) = reference::forward_backward(&objective, &batch, student).unwrap();
        let mut gradient: Aligned<bf16> = vec![bf16::NAN; tokens * row].into_iter().collect();
        let mut to = LogitsMut::strided(&mut gradient[..], tokens, vocab, row).unwrap();
        let run = simulation.run(&objective, &batch, student, Some(&mut to), Extra::default());
        let (_, traffic) = run.unwrap();
        assert!(traffic.iter().any(|(name, _)| name.starts_with(kernel)), "{kernel}");
        for (found, exact) in gradient.chunks(row).zip(exact.chunks(vocab)) {
            for (&found, exact) in found.iter().zip(exact) {
                let allowed = 1e-6 + 2.0_f64.powi(-8) * exact.abs();
                assert!(
                    (f64::from(found) - exact).abs() <= allowed,
                    "{found}, but exactly {exact}"
                );
            }
            assert!(found[vocab..].iter().all(|z| z.is_nan()));
        }
    }
}

#[test]
fn an_upstream_gradient_from_the_device() {
    let input = Input::new(5, 700);
    let upstream = Extra { upstream: Some(-2.5) };
    let host = Objective::default().with_upstream_gradient(-2.5).unwrap();
    let simulation = Simulation::default();
    let by_device = input.run(simulation, &Objective::default(), upstream);
    let by_host = input.run(simulation, &host, Extra::default());
    assert_eq!((by_device.0, by_device.1), (by_host.0, by_host.1));
}

/// Every element is multiplied and rounded once, nothing between the rows is touched, and nothing at all by 1.
#[test]
fn scaled_gradients() {
    fn check<T>(narrow: fn(f32) -> T, widen: fn(T) -> f32)
    where
        T: Copy + PartialEq + std::fmt::Debug,
        for<'a> atkd::ElementsMut<'a>: From<&'a mut [T]>,
    {
        let mut one = Simulation { seed: 3, ..Simulation::default() };
        one.device.multiprocessors = 1;
        // Rows that start anywhere; more blocks than rows, which share them; more rows than blocks.
        // The last two numbers are of rows that are not evenly spaced.
        for (simulation, tokens, vocab, stride, inner, outer) in [
            (Simulation::default(), 3, 9001, 9003, 3, 0),
            (Simulation::default(), 1, 4096, 4096, 1, 0),
            (Simulation::default(), 6, 2000, 2000, 3, 8001),
            (one, 70, 300, 301, 70, 0),
            (one, 70, 300, 3000, 10, 301),
            (one, 5, 1, 2, 5, 0),
            (one, 0, 7, 7, 1, 0),
        ] {
            let starts: Vec<usize> =
                (0..tokens).map(|i| i / inner * outer + i % inner * stride).collect();
            let length = starts.iter().max().map_or(0, |start| start + vocab);
            let mut inside = vec![false; length];
            for &start in &starts {
                inside[start..start + vocab].fill(true);
            }
            let strides: Strides = match outer {
                0 => stride.into(),
                _ => Strides::nested(inner, outer, stride),
            };
            let mut random = fastrand::Rng::with_seed(7);
            let before: Vec<T> = (0..length).map(|_| narrow(random.f32() - 0.5)).collect();
            for factor in [0.37_f32, 0.0, -3.0, 1.0] {
                let mut memory = before.clone();
                let mut gradient =
                    LogitsMut::strided(&mut memory[..], tokens, vocab, strides).unwrap();
                let traffic = simulation.scale_gradient(&mut gradient, factor).unwrap();
                for (i, (&now, &before)) in memory.iter().zip(&before).enumerate() {
                    let scaled = narrow(widen(before) * factor);
                    assert_eq!(now, if inside[i] { scaled } else { before }, "{i}");
                }
                let Some((kernel, _)) = traffic.first() else {
                    assert_eq!(tokens, 0);
                    continue;
                };
                let volume =
                    if factor == 1.0 { 0 } else { (tokens * vocab * size_of::<T>()) as u64 };
                let (read, written, accesses) = counts(&traffic, kernel, "gradient");
                assert_eq!((read, written), (volume, volume));
                // 16 bytes at a time but for the ends.
                assert!(accesses <= 2 * (volume / 16 + 16 * tokens as u64));
            }
        }
    }
    check(|x| x, |x| x);
    check(f16::from_f32, f16::to_f32);
    check(bf16::from_f32, bf16::to_f32);
}

/// Margins of many rows by few blocks, of 1 warp, of 3 and of 8. Of some rows one logit is far above any prediction.
#[test]
fn margins_of_many_rows_a_block() {
    for (tokens, vocab) in [(150, 700), (120, 5000), (40, 16_400)] {
        let mut input = Input::new(tokens, vocab);
        for token in (0..tokens).step_by(3) {
            input.teacher[token * vocab + token * 5153 % vocab] = bf16::from_f32(120.0);
        }
        for token in (0..tokens).step_by(7) {
            input.labels[token] = -100;
        }
        for target in [Target::Label, Target::Teacher] {
            let objective = Objective::default().with_target(target);
            let student = input.view(&input.student);
            let expected = reference::forward(&objective, &input.batch(), student).unwrap();
            for seed in 0..3 {
                let mut few = Simulation { seed, ..preferring(RowKernel::Stream, 0) };
                few.device.multiprocessors = 1;
                let mut in_place = input.student.clone();
                let mut in_place = LogitsMut::new(&mut in_place, tokens, vocab).unwrap();
                let (output, traffic) = few
                    .run_in_place(&objective, &input.batch(), &mut in_place, Extra::default())
                    .unwrap();
                assert_eq!(traffic[0].0, "teacher_margin_bf16");
                for (token, exact) in output.tokens.iter().zip(&expected.tokens) {
                    assert_eq!(token.valid, exact.valid);
                    let (margin, exact) = (token.margin, exact.margin);
                    assert!(
                        margin == exact || (margin - exact).abs() < 2e-6 * (1.0 + exact.abs()),
                        "{margin} {exact}"
                    );
                }
            }
        }
    }
}

/// The caller's margins decide which tokens are hard, and the teacher is read once less.
#[test]
fn margins_from_the_caller() {
    let mut input = Input::new(6, 200);
    input.labels[1] = -100;
    let margins = [0.0, 9.0, -3.0, 2.0, f32::NAN, 2.0];
    let batch = input.batch().with_margins(&margins).unwrap();
    let objective = Objective::default().with_hard_ratio(0.3).unwrap();
    let run =
        |objective| input.run_batch(Simulation::default(), objective, &batch, Extra::default());
    let own = input.run(Simulation::default(), &objective, Extra::default()).0;
    let (output, _, traffic) = run(&objective);
    let hard: Vec<bool> = output.tokens.iter().map(|token| token.hard).collect();
    assert_eq!(hard, [false, false, false, true, false, true]);
    assert_eq!(traffic[0].0, "select_hard");
    let margins = |output: &Output| output.tokens.iter().map(|t| t.margin).collect::<Vec<_>>();
    assert_eq!(margins(&output), margins(&own));
    assert!(output.tokens[4].loss.is_finite());
    // With the teacher's arg max as target its logits are read all the same.
    let objective = objective.with_target(Target::Teacher);
    let (output, _, traffic) = run(&objective);
    let hard: Vec<bool> = output.tokens.iter().map(|token| token.hard).collect();
    assert_eq!(hard, [false, false, false, true, false, true]);
    assert_eq!(traffic[0].0, "teacher_margin_bf16");
}

/// A call that is told which tokens are hard comes to the same bits as one that finds them by itself, in place too, and
/// reads either model once.
#[test]
fn a_mask_is_the_calls_own_selection() {
    for (simulation, tokens, vocab) in [
        (Simulation::default(), 9, 300),
        (pipelined(2, 2), 9, 700),
        (pipelined_by(RowKernel::PipelinedWide, 1, 2), 9, 300),
        (streamed(64, 2, 1), 9, 700),
        (in_teams(2, 2), 9, 700),
        (Simulation::default(), 0, 5),
        (Simulation::default(), 1, 5),
    ] {
        let mut input = Input::new(tokens, vocab);
        for token in (1..tokens).step_by(4) {
            input.labels[token] = -100;
        }
        let volume = (2 * tokens * vocab) as u64;
        for target in [Target::Label, Target::Teacher] {
            let objective = Objective::atkd(0.3).unwrap().with_ce_weight(0.1).unwrap();
            let objective = objective.with_target(target);
            let (output, gradient, _) = input.run(simulation, &objective, Extra::default());
            let hard: Vec<bool> = output.tokens.iter().map(|token| token.hard).collect();
            // The ratio is not used.
            let objective = objective.with_hard_ratio(0.9).unwrap();
            let nonsense = vec![f32::NAN; tokens];
            let batch = input.batch().with_margins(&nonsense).unwrap();
            let batch = batch.with_hard(&hard).unwrap();
            let (masked, with_mask, traffic) =
                input.run_batch(simulation, &objective, &batch, Extra::default());
            // The margins of the teacher's arg max are another kernel's.
            assert_eq!(masked, output);
            assert_eq!(with_mask, gradient);
            let mut in_place = input.student.clone();
            let mut view = LogitsMut::new(&mut in_place, tokens, vocab).unwrap();
            let (masked, in_place_traffic) =
                simulation.run_in_place(&objective, &batch, &mut view, Extra::default()).unwrap();
            assert_eq!(masked, output);
            assert_eq!(in_place, gradient);
            for traffic in [traffic, in_place_traffic] {
                let kernels: Vec<&str> = traffic.iter().map(|(kernel, _)| *kernel).collect();
                if tokens == 0 {
                    assert_eq!(kernels, ["token_terms"]);
                    continue;
                }
                let margins = target == Target::Teacher;
                let [count, rows, terms] = kernels[usize::from(margins)..] else {
                    panic!("{kernels:?}")
                };
                assert!(!margins || kernels[0] == "teacher_margin_bf16");
                assert_eq!((count, terms), ("count_valid", "token_terms"));
                assert!(rows.starts_with("row_"), "{kernels:?}");
                if rows.starts_with("row_stream") || margins {
                    continue;
                }
                let ignored = input.labels.iter().filter(|&&label| label == -100).count();
                let read = volume - (2 * ignored * vocab) as u64;
                let slack = (64 * tokens) as u64;
                for model in ["teacher", "student"] {
                    let (found, _) = bytes(&traffic, rows, model);
                    assert!(found >= read && found <= read + slack, "{model}: {found} of {read}");
                }
            }
        }
    }
}

/// The margins by themselves are those of a call in place, in which the same kernel computes them.
#[test]
fn margins_apart_from_a_call() {
    for (tokens, vocab) in [(40, 700), (5, 16_400), (0, 3), (1, 1)] {
        let mut input = Input::new(tokens, vocab);
        for token in (0..tokens).step_by(7) {
            input.labels[token] = -100;
        }
        for target in [Target::Label, Target::Teacher] {
            let objective = Objective::default().with_target(target).with_temperature(2.0).unwrap();
            let mut few = Simulation::default();
            few.device.multiprocessors = 1;
            let mut in_place = input.student.clone();
            let mut in_place = LogitsMut::new(&mut in_place, tokens, vocab).unwrap();
            let (output, _) = few
                .run_in_place(&objective, &input.batch(), &mut in_place, Extra::default())
                .unwrap();
            let (margins, traffic) = few.teacher_margins(&objective, &input.batch()).unwrap();
            let expected: Vec<f32> =
                output.tokens.iter().map(|token| token.margin as f32).collect();
            assert_eq!(margins, expected);
            if tokens > 0 {
                assert_eq!(traffic[0].0, "teacher_margin_bf16");
                assert_eq!(counts(&traffic, "teacher_margin_bf16", "margins").1, 4 * tokens as u64);
            }
        }
    }
    let mut input = Input::new(4, 50);
    input.labels = vec![49, 50, -100, -1];
    let (margins, _) =
        Simulation::default().teacher_margins(&Objective::default(), &input.batch()).unwrap();
    assert!(margins[0].is_finite() && margins[1].is_nan() && margins[3].is_nan());
    assert_eq!(margins[2], f32::NEG_INFINITY);
}

/// They are the CPU's, of more tokens than threads too.
#[test]
fn selections_apart_from_a_call() {
    let special = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1.0, -1.0];
    let mut random = fastrand::Rng::with_seed(8);
    for tokens in [0, 1, 5, 64, 700] {
        for ratio in [0.0, 0.3, 0.5, 1.0] {
            for distinct in [1, 8, usize::MAX] {
                let margins: Vec<f32> = (0..tokens)
                    .map(|_| match distinct {
                        usize::MAX => 8.0 * random.f32() - 4.0,
                        _ => special[random.usize(..distinct)],
                    })
                    .collect();
                let valid: Vec<bool> = (0..tokens).map(|_| random.u32(..4) > 0).collect();
                let middle = random.usize(..=tokens);
                let offsets = [0, middle, middle, tokens];
                for (valid, sequences) in
                    [(None, None), (Some(&valid[..]), None), (Some(&valid[..]), Some(&offsets[..]))]
                {
                    let expected = atkd::select_hard(&margins, valid, ratio, sequences).unwrap();
                    let simulation = Simulation { seed: random.u64(..), ..Simulation::default() };
                    let (hard, _) =
                        simulation.select_hard(&margins, valid, ratio, sequences).unwrap();
                    assert_eq!(hard, expected);
                }
            }
        }
    }
    let error = Simulation::default().select_hard(&[1.0], None, 1.5, None).unwrap_err();
    assert!(matches!(error, Error::Setting { name: "the hard ratio", .. }), "{error}");
}

/// On a device nobody looks at the labels beforehand: a kernel does, drops the token, and says so.
#[test]
fn labels_out_of_range_are_faults() {
    let mut input = Input::new(5, 40);
    let student = input.view(&input.student.clone()).elements().len();
    assert_eq!(student, 200);
    for (label, objective) in [
        (40, Objective::default()),
        (-1, Objective::kl()),
        (i64::MAX, Objective::default().with_target(Target::Teacher)),
        (i64::MIN, Objective::dkd()),
    ] {
        input.labels[3] = label;
        input.labels[4] = label;
        let mut gradient = vec![bf16::NAN; 200];
        let mut to = LogitsMut::new(&mut gradient, 5, 40).unwrap();
        let student = input.view(&input.student);
        let result = Simulation::default().run(
            &objective,
            &input.batch(),
            student,
            Some(&mut to),
            Extra::default(),
        );
        let expected = Error::DeviceLabel { token: 3, vocab: 40, ignore_index: -100 };
        assert_eq!(result.unwrap_err(), expected);
        assert!(gradient[120..].iter().all(|&g| g == bf16::ZERO), "the tokens are dropped");
        assert!(gradient[..120].iter().all(|&g| g.is_finite()));
    }
}

#[test]
fn batches_without_a_valid_token() {
    let mut input = Input::new(3, 50);
    input.labels.fill(-100);
    for reduction in [Reduction::Mean, Reduction::Sum, Reduction::Denominator(7.0)] {
        let objective = Objective::default().with_reduction(reduction).unwrap();
        let (output, gradient, _) = input.run(Simulation::default(), &objective, Extra::default());
        assert_eq!(output.loss, 0.0);
        assert!(gradient.iter().all(|&g| g == bf16::ZERO));
    }
    let empty = Input::new(0, 50);
    assert_eq!(
        empty.run(Simulation::default(), &Objective::default(), Extra::default()).0.loss,
        0.0
    );
}

/// Many more tokens than threads, in clusters and alone, with many equal margins.
#[test]
fn selection_of_many_tokens() {
    for (tokens, block, cluster) in [
        (1, 32, 8),
        (300, 1024, 1),
        (4096, 256, 1),
        (20_000, 32, 1),
        (20_000, 64, 8),
        (33_000, 1024, 8),
    ] {
        let mut input = Input::new(tokens, 3);
        for z in &mut input.teacher {
            *z = bf16::from_f32(z.to_f32().round());
        }
        for i in (0..tokens).step_by(17) {
            input.labels[i] = -100;
        }
        let student = input.view(&input.student);
        for ratio in [0.03, 0.5, 0.99] {
            let objective = Objective::default().with_hard_ratio(ratio).unwrap();
            let simulation = Simulation { block, cluster, seed: 5, ..Simulation::default() };
            let (output, _) = simulation
                .run(&objective, &input.batch(), student, None, Extra::default())
                .unwrap();
            // The kernel's own margins, since margins that differ in float64 may not in float32.
            let margin = |i: usize| output.tokens[i].margin;
            let mut order: Vec<usize> = (0..tokens).filter(|i| i % 17 != 0).collect();
            order.sort_by(|&i, &j| margin(j).total_cmp(&margin(i)).then(i.cmp(&j)));
            order.truncate((ratio * order.len() as f64).ceil() as usize);
            order.sort();
            let hard: Vec<usize> = (0..tokens).filter(|&i| output.tokens[i].hard).collect();
            assert_eq!(hard, order, "{tokens} tokens, hard ratio {ratio}");
        }
    }
}

/// Offsets are checked by the kernel as well as on the host, which a device's are not.
#[test]
fn sequences() {
    let input = Input::new(10, 30);
    let offsets = [0, 0, 3, 3, 10, 10];
    let batch = input.batch().with_sequences(&offsets).unwrap();
    let objective = Objective::default().with_hard_ratio(0.4).unwrap();
    let student = input.view(&input.student);
    let (output, _) =
        Simulation::default().run(&objective, &batch, student, None, Extra::default()).unwrap();
    let hard = |range: std::ops::Range<usize>| {
        output.tokens[range].iter().filter(|token| token.hard).count()
    };
    assert_eq!((hard(0..3), hard(3..10)), (2, 3));
}

/// The baseline of the benchmarks computes what it is compared with.
#[test]
fn the_unfused_kernels_compute_the_same_loss() {
    let (tokens, vocab) = (9, 50);
    let mut random = fastrand::Rng::with_seed(2);
    let mut logits = || -> Vec<f32> { (0..tokens * vocab).map(|_| 3.0 * random.f32()).collect() };
    let (teacher, student) = (logits(), logits());
    let labels: Vec<i64> = (0..tokens as i64).map(|i| i * 5).collect();
    let view = |logits| Logits::new(logits, tokens, vocab).unwrap();
    let batch = Batch::new(view(&teacher), &labels).unwrap();
    let mut gradient = vec![f32::NAN; tokens * vocab];
    let mut to = LogitsMut::new(&mut gradient, tokens, vocab).unwrap();
    let (loss, kernels) =
        Simulation::default().run_unfused(&batch, view(&student), &mut to).unwrap();
    assert!(kernels > 30);
    let (exact, exact_gradient) =
        reference::forward_backward(&Objective::default(), &batch, view(&student)).unwrap();
    // The epsilons, beside probabilities of about 1/50, cost about five digits less than float64.
    approx::assert_relative_eq!(loss, exact.loss, max_relative = 1e-5);
    for (&g, exact) in gradient.iter().zip(exact_gradient) {
        approx::assert_abs_diff_eq!(f64::from(g), exact, epsilon = 1e-7);
    }
}

/// The last row starts at element 2^31: offsets of 32 bits would wrap. The memory between the rows is
/// never touched, so the machine need not have it.
#[test]
fn rows_beyond_2_31_elements() {
    use half::slice::HalfBitsSliceExt;
    let (tokens, vocab, stride) = (3, 1000, 1 << 30);
    let length = (tokens - 1) * stride + vocab;
    let small = Input::new(tokens, vocab);
    let spread = |rows: &[bf16]| -> Vec<u16> {
        let mut memory = vec![0_u16; length];
        for (i, row) in rows.chunks(vocab).enumerate() {
            memory.reinterpret_cast_mut::<bf16>()[i * stride..][..vocab].copy_from_slice(row);
        }
        memory
    };
    let (teacher, student) = (spread(&small.teacher), spread(&small.student));
    let mut gradient = vec![0_u16; length];
    let view = |memory| {
        let elements: &[bf16] = <[u16] as HalfBitsSliceExt>::reinterpret_cast(memory);
        Logits::strided(elements, tokens, vocab, stride).unwrap()
    };
    let batch = Batch::new(view(&teacher), &small.labels).unwrap();
    let objective = Objective::default();
    for backend in [simt::forward_backward, cpu::forward_backward] {
        gradient[(tokens - 1) * stride..].fill(0);
        let elements: &mut [bf16] = gradient.reinterpret_cast_mut();
        let to = LogitsMut::strided(elements, tokens, vocab, stride).unwrap();
        let output = backend(&objective, &batch, view(&student), to).unwrap();

        let near = |v| Logits::new(v, tokens, vocab).unwrap();
        let near_batch = Batch::new(near(&small.teacher), &small.labels).unwrap();
        let mut expected = vec![bf16::ZERO; tokens * vocab];
        let to = LogitsMut::new(&mut expected, tokens, vocab).unwrap();
        assert_eq!(backend(&objective, &near_batch, near(&small.student), to).unwrap(), output);
        let gradient: &[bf16] = gradient.reinterpret_cast();
        for (i, row) in expected.chunks(vocab).enumerate() {
            assert_eq!(gradient[i * stride..][..vocab], *row, "row {i}");
        }
    }
}
