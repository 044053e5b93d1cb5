//! The CUDA kernels within their budgets of memory traffic, counted by the simulator.

mod simulated;
#[path = "simulated/shards.rs"]
mod stages;

use atkd::battery::Aligned;
use atkd::simt::machine::Buffer;
use atkd::simt::{Extra, Simulation, Traffic};
use atkd::{Batch, Divergence, ElementsMut, Logits, LogitsMut, Objective, Output, reference};
use half::bf16;
use simulated::{Input, bytes, counts, in_teams, pipelined, streamed};
use stages::Shards;

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
        // Memory that nothing depends on is not read.
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

/// The traffic of a call with a gradient of the type of `unset`, which must be the reference's.
fn traffic_of<T>(objective: &Objective, batch: &Batch, student: Logits, unset: T) -> Traffic
where
    T: Copy + Into<f64>,
    for<'a> &'a mut [T]: Into<ElementsMut<'a>>,
{
    let (tokens, vocab) = (student.tokens(), student.vocab());
    let mut gradient = vec![unset; tokens * vocab];
    let mut to = LogitsMut::new(&mut gradient[..], tokens, vocab).unwrap();
    let extra = Extra::default();
    let run = Simulation::default().run(objective, batch, student, Some(&mut to), extra);
    let (_, traffic) = run.unwrap();
    let (_, exact) = reference::forward_backward(objective, batch, student).unwrap();
    let rounding = if size_of::<T>() == 4 { 0.0 } else { 2.0_f64.powi(-8) };
    for (&g, exact) in gradient.iter().zip(exact) {
        let found: f64 = g.into();
        let allowed = 1e-6 + rounding * exact.abs();
        assert!((found - exact).abs() <= allowed, "{found}, but exactly {exact}");
    }
    traffic
}

/// So are they for a float32 gradient, which is twice as large, and for cross entropy at another temperature: of rows that
/// all start at chunks, and that do not.
#[test]
fn rows_on_chip_are_read_once_for_a_wide_gradient() {
    let kl = Objective::kl();
    let at_1 = kl.with_temperature(2.0).and_then(|kl| kl.with_ce_weight(0.5)).unwrap();
    for (vocab, objective, kernel, blocks) in [
        (2048, kl, "row_pipelined_bf16", 1),
        (32_000, kl, "row_pipelined_wide_bf16", 2),
        (50_257, kl, "row_pipelined_wide_bf16", 3),
        (4096, at_1, "row_pipelined_wide_at_1_bf16", 1),
        (50_257, at_1, "row_pipelined_wide_at_1_bf16", 3),
    ] {
        let input = Input::new(2, vocab);
        let student = input.view(&input.student);
        let traffic = traffic_of(&objective, &input.batch(), student, f32::NAN);
        let (volume, target) = ((input.tokens * vocab * 2) as u64, 2 * input.tokens as u64);
        for buffer in ["teacher", "student"] {
            assert_eq!(bytes(&traffic, kernel, buffer), (volume + blocks * target, 0), "{vocab}");
        }
        let (_, written, accesses) = counts(&traffic, kernel, "gradient");
        assert_eq!(written, 2 * (volume + target));
        assert!(accesses <= written / 16 + 14 * input.tokens as u64, "{accesses} of {written}");
    }
}

/// So are they for a gradient in half precision of float32 logits, which is half as large.
#[test]
fn rows_on_chip_are_read_once_for_a_narrow_gradient() {
    for (vocab, kernel, blocks) in [
        (2048, "row_pipelined_f32", 1),
        (32_000, "row_pipelined_wide_f32", 4),
        (50_257, "row_pipelined_wide_f32", 6),
    ] {
        let input = Input::new(2, vocab);
        let [teacher, student] = [&input.teacher, &input.student]
            .map(|logits| logits.iter().map(|z| z.to_f32()).collect::<Aligned<f32>>());
        let [teacher, student] =
            [&teacher, &student].map(|logits| Logits::new(&logits[..], 2, vocab).unwrap());
        let batch = Batch::new(teacher, &input.labels).unwrap();
        let traffic = traffic_of(&Objective::default(), &batch, student, bf16::NAN);
        for buffer in ["teacher", "student"] {
            let expected = (4 * 2 * (vocab + blocks)) as u64;
            assert_eq!(bytes(&traffic, kernel, buffer), (expected, 0), "{vocab}");
        }
        let (_, written, accesses) = counts(&traffic, kernel, "gradient");
        assert_eq!(written, (2 * 2 * (vocab + 1)) as u64);
        assert!(accesses <= written / 8 + 14 * 2, "{accesses} of {written}");
    }
}

/// So are they where one model is float32 and the other is not.
#[test]
fn rows_on_chip_of_two_types_are_read_once() {
    for (vocab, blocks) in [(4096, 1), (32_000, 3), (50_257, 4)] {
        let input = Input::new(2, vocab);
        let objective = Objective::kl();
        let [teacher, student] = [&input.teacher, &input.student]
            .map(|logits| logits.iter().map(|z| z.to_f32()).collect::<Vec<f32>>());
        let wide = [&teacher, &student].map(|logits| Logits::new(logits, 2, vocab).unwrap());
        let [wide_teacher, wide_student] = wide;
        for (kernel, teacher, student) in [
            ("row_pipelined_wide_f32_bf16", wide_teacher, input.view(&input.student)),
            ("row_pipelined_wide_bf16_f32", input.view(&input.teacher), wide_student),
        ] {
            let batch = Batch::new(teacher, &input.labels).unwrap();
            let traffic = traffic_of(&objective, &batch, student, f32::NAN);
            for (buffer, logits) in [("teacher", teacher), ("student", student)] {
                let size = logits.dtype().size();
                let expected = (size * 2 * (vocab + blocks)) as u64;
                assert_eq!(bytes(&traffic, kernel, buffer), (expected, 0), "{kernel} {vocab}");
            }
            assert_eq!(counts(&traffic, kernel, "gradient").1, (4 * 2 * (vocab + 1)) as u64);
        }
    }
}

/// The same for every divergence: a second sweep finds the row where the first left it, on chip; `row_stream` reads it
/// once more.
#[test]
fn every_divergence_reads_rows_on_chip_once() {
    let divergences = [
        (Divergence::ReverseKl, "_reverse_kl", 1),
        (Divergence::Jsd { beta: 0.3 }, "_mixture", 2),
        (Divergence::TotalVariation, "_total_variation", 2),
        (Divergence::SkewKl { alpha: 0.1 }, "_mixture", 2),
        (Divergence::SkewReverseKl { alpha: 0.1 }, "_mixture", 2),
    ];
    for (divergence, suffix, sweeps) in divergences {
        for plain in [false, true] {
            let objective = if plain { Objective::plain() } else { Objective::dkd() };
            let objective = objective.with_divergence(divergence).unwrap();
            for (vocab, kernel, blocks) in [
                (2000, "row_resident_bf16", 1),
                (2048, "row_pipelined_bf16", 1),
                (32_000, "row_pipelined_wide_bf16", 2),
                (4096, "row_stream_bf16_bf16_bf16", 1),
            ] {
                let stream = kernel.starts_with("row_stream");
                let simulation = if stream { streamed(128, 1, 1) } else { Simulation::default() };
                let input = Input::new(2, vocab);
                let (output, gradient, traffic) =
                    input.run(simulation, &objective, Extra::default());
                input.check(&objective, &(output, gradient));
                let volume = (input.tokens * vocab * 2) as u64;
                let target = 2 * input.tokens as u64;
                let reads = if stream { 1 + sweeps } else { 1 };
                let name = format!("{kernel}{suffix}");
                for buffer in ["teacher", "student"] {
                    let expected = (reads * volume + blocks * target, 0);
                    assert_eq!(bytes(&traffic, &name, buffer), expected, "{name} of {buffer}");
                }
                let (_, written, _) = counts(&traffic, &name, "gradient");
                let again = if kernel == "row_resident_bf16" { 0 } else { target };
                assert_eq!(written, volume + again, "{name}");
            }
        }
    }
}

/// States and terms read both models once and write 40 and 12 bytes per token; the gradient reads them once more and is
/// written once. Margins and the last stage read no logits.
#[test]
fn shards_are_read_once_per_stage() {
    let input = Input::new(7, 4099);
    let (batch, student) = (input.batch(), input.view(&input.student));
    let tokens = input.tokens as u64;
    for (divergence, states_suffix, suffix) in [
        (Divergence::ForwardKl, "", ""),
        (Divergence::ReverseKl, "_reverse_kl", "_reverse_kl"),
        (Divergence::Jsd { beta: 0.3 }, "_two_sweeps", "_mixture"),
        (Divergence::TotalVariation, "_two_sweeps", "_total_variation"),
    ] {
        let objective = Objective::plain().with_divergence(divergence).unwrap();
        let simulation = Simulation::default();
        let shards = Shards::new(simulation, &objective, &batch, student, &[1, 0, 2]);
        let exchange = shards.exchange().unwrap();
        for (rank, columns) in shards.columns.iter().enumerate().filter(|(_, c)| !c.is_empty()) {
            let targets = input.labels.iter().filter(|&&label| columns.contains(&(label as usize)));
            let target = 2 * targets.count() as u64;
            let volume = 2 * tokens * columns.len() as u64;
            // Fewer than a chunk's at either end, and the target.
            let single = (2 * 7 + 1) * tokens;
            let of_states = format!("row_states_bf16_bf16{states_suffix}");
            let reads = |traffic: &Traffic, kernel: &str, more: u64| {
                for buffer in ["teacher", "student"] {
                    let (read, written, accesses) = counts(traffic, kernel, buffer);
                    assert_eq!((read, written), (volume + more, 0), "{kernel} of {buffer}");
                    assert!(accesses <= read / 16 + single, "{kernel}: {accesses} accesses");
                }
            };
            reads(&exchange.traffic[rank], &of_states, target);
            let own = bytes(&exchange.traffic[rank], &of_states, "own states");
            assert_eq!(own, (0, 40 * tokens));
            let all_states = 3 * 40 * tokens;
            if exchange.terms.is_some() {
                let of_terms = format!("row_terms_bf16_bf16{suffix}");
                let traffic = &exchange.traffic[3 + rank];
                reads(traffic, &of_terms, 0);
                assert_eq!(bytes(traffic, &of_terms, "own terms"), (0, 12 * tokens));
                assert_eq!(bytes(traffic, &of_terms, "states"), (all_states, 0));
            }
            let mut gradient = vec![bf16::NAN; input.student.len()];
            let mut to = LogitsMut::new(&mut gradient, input.tokens, input.vocab).unwrap();
            let kernel = format!("row_gradient_bf16_bf16{suffix}");
            let traffic = shards.gradient(rank, &exchange, None, &mut to).unwrap();
            let names: Vec<_> = traffic.iter().map(|(name, _)| *name).collect();
            assert_eq!(names, ["count_valid", &kernel]);
            reads(&traffic, &kernel, 0);
            let (_, written, accesses) = counts(&traffic, &kernel, "gradient");
            assert_eq!(written, volume + target);
            assert!(accesses <= written / 16 + single, "{accesses} of {written}");
            assert_eq!(bytes(&traffic, &kernel, "states"), (all_states, 0));
            // Neither stage is given logits.
            let (shard, exchanged) = (shards.shard(rank, None).unwrap(), exchange.view());
            simulation.shard_margins(&objective, &shard, &exchanged).unwrap();
            let (_, traffic) = simulation.shard_finish(&objective, &shard, &exchanged).unwrap();
            let merge = format!("merge_states{suffix}");
            let terms = format!("token_terms{suffix}");
            let names: Vec<_> = traffic.iter().map(|(name, _)| *name).collect();
            assert_eq!(names, ["count_valid", &merge, &terms]);
        }
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
