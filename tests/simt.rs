//! The CUDA kernels, run by the simulator: against float64, whatever the schedule, within their
//! budgets of memory traffic; and the simulator, against kernels that are wrong.

use atkd::plan::{LaunchShape, Preference, RowKernel};
use atkd::simt::machine::{Buffer, Kernel, run};
use atkd::simt::{self, Extra, Simulation, Traffic};
use atkd::{
    Batch, Error, Logits, LogitsMut, Objective, Output, Reduction, Strides, Target, battery, cpu,
    reference,
};
use half::{bf16, f16};

fn pass_the_battery(simulation: Simulation) {
    let backend = |objective: &Objective, batch: &Batch, student: Logits, mut to: LogitsMut| {
        Ok(simulation.run(objective, batch, student, Some(&mut to), Extra::default())?.0)
    };
    let checks = battery::run(backend, |_| {});
    battery::assert_all_pass(&checks);
}

#[test]
fn the_kernels_pass_the_battery() {
    pass_the_battery(Simulation::default());
}

fn preferring(row_kernel: RowKernel, team: u32) -> Simulation {
    let preferred = Some(Preference { row_kernel, team });
    Simulation { preferred, ..Simulation::default() }
}

#[test]
fn the_kernels_pass_the_battery_with_every_row_read_twice() {
    pass_the_battery(Simulation { seed: 1, ..preferring(RowKernel::Stream, 0) });
}

/// Rows in the shared memory of few teams, each of which has many to do.
fn pipelined(team: u32, teams: u32) -> Simulation {
    pipelined_by(RowKernel::Pipelined, team, teams)
}

fn pipelined_by(row_kernel: RowKernel, team: u32, teams: u32) -> Simulation {
    let mut simulation = preferring(row_kernel, team);
    simulation.device.multiprocessors = 1;
    simulation.device.pipelined_blocks = team * teams;
    simulation.device.pipelined_wide_blocks = team * teams;
    // However large, so that small teams hold large rows too.
    simulation.device.shared_bytes = 16 << 20;
    simulation
}

#[test]
fn the_kernels_pass_the_battery_with_rows_in_shared_memory() {
    pass_the_battery(Simulation { seed: 2, ..pipelined(1, 1) });
    pass_the_battery(Simulation { seed: 3, predicted_threshold: 0, ..pipelined(3, 2) });
    pass_the_battery(Simulation { seed: 4, ..pipelined_by(RowKernel::PipelinedWide, 2, 1) });
}

/// Rows read twice by few teams, each of which has many to do.
fn in_teams(team: u32, teams: u32) -> Simulation {
    let preferred = Some(Preference { row_kernel: RowKernel::Stream, team });
    let mut simulation = Simulation { preferred, ..Simulation::default() };
    simulation.device.pipelined_blocks = 0;
    simulation.device.pipelined_wide_blocks = 0;
    simulation.device.multiprocessors = (team * teams).div_ceil(2);
    simulation
}

#[test]
fn the_kernels_pass_the_battery_in_teams() {
    pass_the_battery(Simulation { seed: 4, block: 32, ..in_teams(4, 2) });
}

#[derive(Clone)]
struct Input {
    tokens: usize,
    vocab: usize,
    teacher: Vec<bf16>,
    student: Vec<bf16>,
    labels: Vec<i64>,
}

impl Input {
    fn new(tokens: usize, vocab: usize) -> Self {
        let mut random = fastrand::Rng::with_seed(9);
        let mut logits = || -> Vec<bf16> {
            (0..tokens * vocab).map(|_| bf16::from_f32(9.0 * random.f32())).collect()
        };
        let (teacher, student) = (logits(), logits());
        let labels = (0..tokens).map(|i| (i * 7919 % vocab) as i64).collect();
        Self { tokens, vocab, teacher, student, labels }
    }

    fn view<'a>(&self, logits: &'a [bf16]) -> Logits<'a> {
        Logits::new(logits, self.tokens, self.vocab).unwrap()
    }

    fn batch(&self) -> Batch<'_> {
        Batch::new(self.view(&self.teacher), &self.labels).unwrap()
    }

    fn run(
        &self,
        simulation: Simulation,
        objective: &Objective,
        extra: Extra,
    ) -> (Output, Vec<bf16>, Traffic) {
        self.run_batch(simulation, objective, &self.batch(), extra)
    }

    fn run_batch(
        &self,
        simulation: Simulation,
        objective: &Objective,
        batch: &Batch,
        extra: Extra,
    ) -> (Output, Vec<bf16>, Traffic) {
        let mut gradient = vec![bf16::NAN; self.tokens * self.vocab];
        let mut to = LogitsMut::new(&mut gradient, self.tokens, self.vocab).unwrap();
        let student = self.view(&self.student);
        let (output, traffic) =
            simulation.run(objective, batch, student, Some(&mut to), extra).unwrap();
        (output, gradient, traffic)
    }

    /// Against the CPU.
    fn check(&self, objective: &Objective, (output, gradient): &(Output, Vec<bf16>)) {
        let mut expected = vec![bf16::NAN; self.tokens * self.vocab];
        let to = LogitsMut::new(&mut expected, self.tokens, self.vocab).unwrap();
        let student = self.view(&self.student);
        let by_cpu = cpu::forward_backward(objective, &self.batch(), student, to).unwrap();
        approx::assert_relative_eq!(output.loss, by_cpu.loss, max_relative = 1e-6);
        for (i, (&actual, &expected)) in gradient.iter().zip(&expected).enumerate() {
            let (actual, expected) = (actual.to_f32(), expected.to_f32());
            assert!(
                (actual - expected).abs() <= 0.01 * expected.abs() + 1e-9,
                "{i}: {actual} {expected}"
            );
        }
    }
}

/// Every row is read twice, by such blocks and clusters.
fn streamed(block: u32, cluster: u32, seed: u64) -> Simulation {
    let mut simulation = Simulation { block, cluster, seed, ..preferring(RowKernel::Stream, 0) };
    // No cache to speak of, so that every row long enough is a whole cluster's.
    simulation.device.l2_bytes = 1;
    simulation
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
            // What is not used.
            let objective = objective.with_hard_ratio(0.9).unwrap();
            let nonsense = vec![f32::NAN; tokens];
            let batch = input.batch().with_margins(&nonsense).unwrap();
            let batch = batch.with_hard(&hard).unwrap();
            let (masked, with_mask, traffic) =
                input.run_batch(simulation, &objective, &batch, Extra::default());
            // Of the teacher's arg max the margins are another kernel's.
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

/// As the CPU's, of more tokens than threads too.
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

/// Bytes that `kernel` read from and wrote to `buffer`, and how many accesses that took.
fn counts(traffic: &Traffic, kernel: &str, buffer: &str) -> (u64, u64, u64) {
    let (_, buffers) = traffic.iter().find(|(name, _)| *name == kernel).expect("it was launched");
    let buffer = buffers.iter().find(|b| b.name() == buffer).expect("it was given");
    (buffer.read, buffer.written, buffer.accesses)
}

/// The bytes alone.
fn bytes(traffic: &Traffic, kernel: &str, buffer: &str) -> (u64, u64) {
    let (read, written, _) = counts(traffic, kernel, buffer);
    (read, written)
}

/// The budget: rows read two volumes twice and write one, selection O(N). The hard tokens are predicted;
/// mispredicted rows are done once more.
#[test]
fn kernels_read_and_write_what_they_should() {
    const ROWS: &str = "row_stream_bf16_bf16_bf16";
    for (vocab, cluster) in [(4096, 1), (16_384, 2)] {
        let input = Input::new(7, vocab);
        let volume = (input.tokens * input.vocab * 2) as u64;
        let simulation = streamed(128, cluster, 1);
        let traffic = |objective: &Objective| input.run(simulation, objective, Extra::default()).2;
        let atkd = traffic(&Objective::default());
        let names: Vec<_> = atkd.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["count_valid", ROWS, "select_hard", ROWS, "token_terms"]);
        assert_eq!(bytes(&atkd, "count_valid", "teacher"), (0, 0));
        // Beside the rows themselves, their target once more: read, and written.
        let target = 2 * input.tokens as u64;
        assert_eq!(bytes(&atkd, ROWS, "teacher"), (2 * volume + target, 0));
        assert_eq!(bytes(&atkd, ROWS, "student"), (2 * volume + target, 0));
        assert_eq!(bytes(&atkd, ROWS, "gradient"), (0, volume + target));
        // 16 bytes at a time, but for the target.
        for buffer in ["teacher", "student", "gradient"] {
            let (read, written, accesses) = counts(&atkd, ROWS, buffer);
            let single = accesses - (read + written) / 16;
            assert!(single <= target, "{buffer}: {single} accesses of less than 16 bytes");
        }
        // Once: there are no more tokens than threads.
        let keys = 4 * input.tokens as u64;
        assert_eq!(bytes(&atkd, "select_hard", "keys"), (keys, 0));
        for buffer in ["teacher", "student", "gradient", "labels"] {
            assert_eq!(bytes(&atkd, "select_hard", buffer), (0, 0), "{buffer}");
        }
        // What nothing depends on is not read.
        for objective in [Objective::kl(), Objective::default().with_hard_ratio(1.0).unwrap()] {
            let kl = traffic(&objective);
            let names: Vec<_> = kl.iter().map(|(name, _)| *name).collect();
            assert_eq!(names, ["count_valid", ROWS, "select_hard", "token_terms"]);
            assert_eq!(bytes(&kl, "count_valid", "teacher"), (0, 0));
            assert_eq!(bytes(&kl, ROWS, "teacher"), (2 * volume + target, 0));
        }
        // A flat row exceeds no estimate at its maximum.
        let flat = Input { teacher: vec![bf16::ZERO; input.teacher.len()], ..input.clone() };
        for input in [&input, &flat] {
            let mut in_place = input.student.clone();
            let mut student = LogitsMut::new(&mut in_place, input.tokens, vocab).unwrap();
            let objective = Objective::default();
            let (_, in_place) = simulation
                .run_in_place(&objective, &input.batch(), &mut student, Extra::default())
                .unwrap();
            // Nothing can be done again where the student's logits are gone.
            let names: Vec<_> = in_place.iter().map(|(name, _)| *name).collect();
            assert_eq!(names, ["teacher_margin_bf16", "select_hard", ROWS, "token_terms"]);
            // Two chunks, of which one has the target, twice more, from the L1 cache.
            let again = 4 * 16 * input.tokens as u64;
            let (read, written, accesses) = counts(&in_place, "teacher_margin_bf16", "teacher");
            assert_eq!((read, written), (volume + target + again, 0));
            assert!(accesses - read / 16 <= target);
        }
        let student = input.view(&input.student);
        let (_, forward) = simulation
            .run(&Objective::kl(), &input.batch(), student, None, Extra::default())
            .unwrap();
        assert_eq!(bytes(&forward, ROWS, "teacher"), (volume + target, 0));
        assert_eq!(bytes(&forward, ROWS, "student"), (volume + target, 0));
    }
}

/// Two volumes, however wrong the last threshold is as a prediction, and the bits that come with a gradient.
#[test]
fn the_loss_alone_reads_every_row_once() {
    let input = Input::new(12, 1000);
    let student = input.view(&input.student);
    let volume = (input.tokens * input.vocab * 2) as u64;
    let objective = Objective::default().with_ce_weight(0.1).unwrap();
    let sequences = [0, 5, 12];
    for simulation in [streamed(64, 2, 1), pipelined(2, 3), in_teams(2, 3), Simulation::default()] {
        for batch in [input.batch(), input.batch().with_sequences(&sequences).unwrap()] {
            let mut gradient = vec![bf16::NAN; student.elements().len()];
            let mut to = LogitsMut::new(&mut gradient, input.tokens, input.vocab).unwrap();
            let (expected, _) = simulation
                .run(&objective, &batch, student, Some(&mut to), Extra::default())
                .unwrap();
            let hard = |output: &Output| -> Vec<bool> {
                output.tokens.iter().map(|token| token.hard).collect()
            };
            for predicted_threshold in [0, u32::MAX] {
                let simulation = Simulation { predicted_threshold, ..simulation };
                let (output, traffic) =
                    simulation.run(&objective, &batch, student, None, Extra::default()).unwrap();
                assert_eq!((output.loss, hard(&output)), (expected.loss, hard(&expected)));
                let read = |name: &str| -> u64 {
                    let of = |(_, buffers): &(_, Vec<Buffer>)| {
                        buffers.iter().find(|buffer| buffer.name() == name).unwrap().read
                    };
                    traffic.iter().map(of).sum()
                };
                // Beside the rows their targets, by each block of a team.
                for name in ["teacher", "student"] {
                    let targets = read(name).checked_sub(volume).unwrap();
                    assert!(targets <= 4 * 2 * input.tokens as u64, "{name}: {targets} more bytes");
                }
            }
        }
    }
}

/// Rows of an odd number of logits, of two types: each starts elsewhere, all but their ends are read 16 bytes at a time.
#[test]
fn rows_of_two_types_that_start_anywhere() {
    let input = Input::new(8, 4099);
    let teacher: Vec<f32> = input.teacher.iter().map(|z| z.to_f32()).collect();
    let teacher = Logits::new(&teacher, input.tokens, input.vocab).unwrap();
    let batch = Batch::new(teacher, &input.labels).unwrap();
    let student = input.view(&input.student);
    let (_, traffic) =
        streamed(128, 1, 0).run(&Objective::kl(), &batch, student, None, Extra::default()).unwrap();
    for (buffer, size) in [("teacher", 4), ("student", 2)] {
        let (read, _, accesses) = counts(&traffic, "row_stream_f32_bf16_bf16", buffer);
        // Fewer than a chunk's at either end, and the target.
        let single = (2 * 7 + 1) * input.tokens as u64;
        assert_eq!(read, size * (4099 + 1) * input.tokens as u64);
        assert!(accesses <= read / 16 + single, "{buffer}: {accesses} accesses");
    }
}

/// Rows that are held on chip are read once and the gradient is written once: three volumes.
#[test]
fn rows_on_chip_are_read_once() {
    for (vocab, kernel, blocks) in [
        (2000, "row_resident_bf16", 1),
        (2048, "row_pipelined_bf16", 1),
        (32_000, "row_pipelined_wide_bf16", 2),
        (50_257, "row_pipelined_wide_bf16", 3),
        (128_256, "row_pipelined_wide_bf16", 7),
        (262_144, "row_pipelined_wide_bf16", 14),
    ] {
        let input = Input::new(2, vocab);
        let objective = Objective::kl();
        let (output, gradient, traffic) =
            input.run(Simulation::default(), &objective, Extra::default());
        input.check(&objective, &(output, gradient));
        let volume = (input.tokens * vocab * 2) as u64;
        // Beside them the target, by each block of a team.
        let target = 2 * input.tokens as u64;
        for buffer in ["teacher", "student"] {
            assert_eq!(bytes(&traffic, kernel, buffer), (volume + blocks * target, 0), "{vocab}");
        }
        // A team writes the target's own gradient over what the others of its chunk came with.
        let (_, written, accesses) = counts(&traffic, kernel, "gradient");
        let again = if kernel == "row_resident_bf16" { 0 } else { target };
        assert_eq!(written, volume + again);
        // 16 bytes or more at a time but for the ends.
        assert!(accesses <= written / 16 + 14 * input.tokens as u64, "{accesses} of {written}");
    }
}

/// Whatever the prediction, the outcome has the same bits; the better it is, the fewer rows are done again.
#[test]
fn a_prediction_changes_nothing_but_the_work() {
    let mut input = Input::new(40, 300);
    input.labels[5] = -100;
    let objective = Objective::default().with_ce_weight(0.1).unwrap();
    for simulation in [streamed(64, 2, 1), pipelined(2, 3), in_teams(2, 3), Simulation::default()] {
        let run = |predicted_threshold| {
            let simulation = Simulation { predicted_threshold, ..simulation };
            let (output, gradient, traffic) = input.run(simulation, &objective, Extra::default());
            let (again, buffers) = &traffic[3];
            assert_eq!(*again, traffic[1].0);
            let gradient_bytes = buffers.iter().find(|b| b.name() == "gradient").unwrap().written;
            ((output, gradient), gradient_bytes / 600)
        };
        let (expected, mispredicted) = run(0);
        // All were taken for hard, and half of 39 are.
        assert_eq!((expected.0.summary().hard_tokens, mispredicted), (20, 19));
        assert_eq!(run(u32::MAX), (expected.clone(), 20));
        let threshold = expected
            .0
            .tokens
            .iter()
            .filter(|token| token.hard)
            .map(|token| (token.margin as f32).to_bits() | 1 << 31)
            .min()
            .unwrap();
        // A gradient decides by a margin that rounding may have left a few units of the last place from the key's.
        assert_eq!(run(threshold - 16), (expected.clone(), 0));
        assert_eq!(run(threshold + 16), (expected, 1));
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
            // Of the kernel's own margins, since margins that differ in float64 may not in float32.
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

/// As `kernels/simt/broken.cpp` has it.
#[repr(C)]
struct Broken {
    data: *mut u32,
}

/// As `kernels/simt/broken.cpp` has it.
#[repr(C)]
struct StagedRows {
    from: *const u32,
    to: *mut u32,
    rows: u32,
}

unsafe extern "C" {
    fn broken_missing_barrier(parameters: &Broken);
    fn broken_missing_warp_barrier(parameters: &Broken);
    fn broken_addition(parameters: &Broken);
    fn broken_arrival_for_others(parameters: &Broken);
    fn broken_divergent_barrier(parameters: &Broken);
    fn broken_two_barriers(parameters: &Broken);
    fn broken_shuffle(parameters: &Broken);
    fn broken_read_outside(parameters: &Broken);
    fn broken_write_outside(parameters: &Broken);
    fn broken_alignment(parameters: &Broken);
    fn broken_unwritten_shared(parameters: &Broken);
    fn broken_shared_bounds(parameters: &Broken);
    fn broken_missing_cluster_barrier(parameters: &Broken);
    fn broken_cluster_barrier(parameters: &Broken);
    fn broken_remote(parameters: &Broken);
    fn broken_team(parameters: &Broken);
    fn broken_rank(parameters: &Broken);
    fn broken_unwaited_read(parameters: &Broken);
    fn broken_early_parity(parameters: &Broken);
    fn broken_late_parity(parameters: &Broken);
    fn broken_few_bytes(parameters: &Broken);
    fn broken_many_bytes(parameters: &Broken);
    fn broken_arrivals(parameters: &Broken);
    fn broken_early_barrier(parameters: &Broken);
    fn broken_refill_of_the_read(parameters: &Broken);
    fn broken_bulk_alignment(parameters: &Broken);
    fn broken_bulk_size(parameters: &Broken);
    fn broken_bulk_outside(parameters: &Broken);
    fn broken_prefetch_size(parameters: &Broken);
    fn broken_prefetch_outside(parameters: &Broken);
    fn broken_staged_bounds(parameters: &Broken);
    fn broken_unwaited_load(parameters: &Broken);
    fn broken_post(parameters: &Broken);
    fn staged_rows(parameters: &StagedRows);
}

/// What a block of two warps, or two blocks of one, of a broken kernel leave behind.
fn broken(kernel: Kernel<Broken>, cluster: u32, seed: u64) -> Result<[u32; 64], String> {
    let shape = LaunchShape { grid: cluster, block: 64 / cluster, cluster, team: 1, shared: 512 };
    broken_in(shape, kernel, seed)
}

fn broken_in(shape: LaunchShape, kernel: Kernel<Broken>, seed: u64) -> Result<[u32; 64], String> {
    #[repr(align(16))]
    struct Memory([u32; 64]);
    let mut memory = Memory([0; 64]);
    let parameters = Broken { data: memory.0.as_mut_ptr() };
    let mut buffers = [Buffer::output("data", &mut memory.0)];
    // SAFETY: the kernel's parameters are these.
    unsafe { run("broken", shape, seed, kernel, &parameters, &mut buffers)? };
    Ok(memory.0)
}

#[track_caller]
fn caught(kernel: Kernel<Broken>, cluster: u32, words: &[&str]) {
    let message = broken(kernel, cluster, 3).expect_err("the mistake must be found");
    for word in words {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
}

/// Whichever access comes first.
#[test]
fn races() {
    for (kernel, cluster, words) in [
        (broken_missing_barrier as Kernel<Broken>, 1, "of cells["),
        (broken_missing_cluster_barrier, 2, "of cells["),
        (broken_missing_warp_barrier, 1, "of cells["),
        (broken_addition, 1, "of cells[0] races"),
        (broken_arrival_for_others, 1, "bulk load of staged memory that another thread may still"),
    ] {
        for seed in 0..9 {
            let fault = broken(kernel, cluster, seed).unwrap_err();
            assert!(fault.contains(words), "{fault}");
        }
    }
}

#[test]
fn barriers_that_threads_never_reach() {
    caught(broken_divergent_barrier, 1, &["block 0", "deadlock", "32 threads", "line", "ended"]);
    caught(broken_two_barriers, 1, &["deadlock", "barrier in line"]);
    caught(broken_cluster_barrier, 2, &["deadlock", "cluster's barrier", "of block 1 have ended"]);
    caught(
        broken_shuffle,
        1,
        &["deadlock", "rest of their warp", "2 threads (first 5) of block 0 have ended"],
    );
}

#[test]
fn blocks_beyond_the_launch_bounds() {
    for block in [96, 1024] {
        let shape = LaunchShape { grid: 1, block, cluster: 1, team: 1, shared: 0 };
        let fault = broken_in(shape, broken_unwritten_shared, 3).unwrap_err();
        let words = format!("a block of {block} threads, but the launch bounds allow 64");
        assert!(fault.contains(&words), "{fault}");
    }
}

const TEAM: LaunchShape = LaunchShape { grid: 2, block: 32, cluster: 1, team: 2, shared: 0 };

#[test]
fn teams_that_never_meet() {
    let fault = broken_in(TEAM, broken_team, 3).unwrap_err();
    for words in [
        "broken: deadlock",
        "32 threads (first 0) of block 0 wait for their team in line",
        "of block 1 have ended",
    ] {
        assert!(fault.contains(words), "{words:?} is not in {fault:?}");
    }
    let fault = broken_in(TEAM, broken_post, 3).unwrap_err();
    assert!(
        fault.contains("32 threads (first 0) of block 1 wait for their team in line"),
        "{fault}"
    );
}

#[test]
fn accesses_that_a_gpu_would_punish() {
    caught(broken_read_outside, 1, &["read of 4 bytes outside", "thread 63", "byte 256 of data"]);
    caught(broken_write_outside, 1, &["write of 4 bytes outside", "byte -", "of data"]);
    caught(broken_alignment, 1, &["16 bytes", "no multiple of 16"]);
}

#[test]
fn shared_memory_that_nobody_wrote() {
    caught(broken_unwritten_shared, 1, &["nobody has written", "cells[9]", "thread 9"]);
    caught(broken_remote, 2, &["block 0 of the cluster, which has ended"]);
    caught(broken_rank, 2, &["block 2 in a cluster of 2"]);
    caught(broken_shared_bounds, 1, &["outside an array", "cells["]);
}

#[test]
fn bulk_copies_that_nobody_waited_for() {
    let load = "staged memory before a wait for the bulk load that fills it";
    caught(broken_unwaited_read, 1, &["read of", load]);
    // The phase before the first is over, until the first is.
    for seed in 0..9 {
        let fault = broken(broken_early_parity, 1, seed).unwrap_err();
        assert!(fault.contains(load) || fault.contains("wait for phase 1 of full[0]"), "{fault}");
    }
    caught(broken_unwaited_load, 1, &["block ended without a wait for a bulk load"]);
    for seed in 0..9 {
        let fault = broken(broken_refill_of_the_read, 1, seed).unwrap_err();
        assert!(fault.contains(load) || fault.contains("another thread may still read"), "{fault}");
    }
}

#[test]
fn phases_that_end_too_early_or_never() {
    for seed in 0..9 {
        let fault = broken(broken_few_bytes, 1, seed).unwrap_err();
        assert!(fault.contains("128 bytes more come than full[0] expects"), "{fault}");
    }
    caught(
        broken_many_bytes,
        1,
        &["deadlock", "64 threads", "wait for phase 0 of full[0] in line"],
    );
    caught(
        broken_late_parity,
        1,
        &["deadlock", "64 threads", "wait for phase 1 of full[0] in line"],
    );
    caught(broken_arrivals, 1, &["more than 1 arrivals in a phase of full[0]"]);
    caught(broken_early_barrier, 1, &["a barrier that nobody has initialised: full[0]"]);
}

#[test]
fn bulk_copies_that_a_gpu_would_punish() {
    caught(broken_bulk_alignment, 1, &["read of 16 bytes", "no multiple of 16"]);
    caught(broken_bulk_size, 1, &["bulk load of 24 bytes"]);
    caught(broken_bulk_outside, 1, &["read of 512 bytes outside the buffers", "byte 0 of data"]);
    caught(broken_staged_bounds, 1, &["bulk load of 256 bytes outside", "byte 384 of 512"]);
    caught(broken_prefetch_size, 1, &["prefetch of 24 bytes", "no multiple of 16"]);
    caught(broken_prefetch_outside, 1, &["outside the buffers", "byte 0 of data"]);
}

/// From buffer to buffer, and in place.
#[test]
fn staged_rows_for_any_schedule() {
    const ROWS: u32 = 5;
    let numbers: Vec<u128> = (0..2 * u128::from(ROWS) * 64).map(|i| i << 64 | i << 31).collect();
    let words = |memory: &[u128]| -> Vec<u32> {
        memory.iter().flat_map(|x| [0, 32, 64, 96].map(|shift| (x >> shift) as u32)).collect()
    };
    let expected: Vec<u32> = words(&numbers).iter().map(|x| x + 1).collect();
    let bytes = 16 * numbers.len() as u64;
    let shape = LaunchShape { grid: 2, block: 64, cluster: 2, team: 1, shared: 2048 };
    for seed in 0..50 {
        let (from, mut to) = (numbers.clone(), vec![0; numbers.len()]);
        let mut buffers = [Buffer::input("from", &from), Buffer::output("to", &mut to)];
        let (from, to_address) = (from.as_ptr().cast(), to.as_mut_ptr().cast());
        let parameters = StagedRows { from, to: to_address, rows: ROWS };
        // SAFETY: the kernel's parameters are these.
        unsafe { run("rows", shape, seed, staged_rows, &parameters, &mut buffers) }.unwrap();
        let counts = buffers.map(|b| (b.read, b.written, b.accesses));
        let rows = 2 * u64::from(ROWS);
        assert_eq!(counts, [(bytes, 0, 2 * rows), (0, bytes, 64 * rows)]);
        assert_eq!(words(&to), expected, "seed {seed}");

        let mut memory = numbers.clone();
        let mut buffers = [Buffer::output("memory", &mut memory)];
        let to = memory.as_mut_ptr().cast();
        let parameters = StagedRows { from: to, to, rows: ROWS };
        // SAFETY: as above.
        unsafe { run("rows", shape, seed, staged_rows, &parameters, &mut buffers) }.unwrap();
        assert_eq!(words(&memory), expected, "in place, seed {seed}");
    }
}
