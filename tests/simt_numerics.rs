//! The CUDA kernels, run by the simulator, where float32 has the least to spare: logits up to the type's largest, finite
//! masks, low and high temperatures, models that agree. Against sums in float64 that share nothing with the crate.

use atkd::battery::Aligned;
use atkd::plan::{Preference, RowKernel};
use atkd::simt::{Extra, Simulation};
use atkd::{
    Batch, Divergence, Dtype, ElementsMut, Logits, LogitsMut, Objective, Output, Reduction,
};
use half::{bf16, f16};

/// One token, exactly.
struct Exact {
    margin: f64,
    tkd: f64,
    dkd: f64,
    loss: f64,
    gradient: Vec<f64>,
}

/// The largest, and log sum e^{(z - largest) / T}.
fn log_sum(z: impl Iterator<Item = f64> + Clone, temperature: f64) -> (f64, f64) {
    let max = z.clone().fold(f64::NEG_INFINITY, f64::max);
    (max, z.map(|z| ((z - max) / temperature).exp()).sum::<f64>().ln())
}

/// log of the softmax.
fn log_softmax(z: &[f64], temperature: f64) -> Vec<f64> {
    let (max, log_sum) = log_sum(z.iter().copied(), temperature);
    z.iter().map(|z| (z - max) / temperature - log_sum).collect()
}

/// A KL divergence, from logarithms.
fn kl(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).map(|(p, q)| if p.exp() == 0.0 { 0.0 } else { p.exp() * (p - q) }).sum()
}

fn without(z: &[f64], target: usize) -> Vec<f64> {
    z.iter().enumerate().filter(|&(j, _)| j != target).map(|(_, &z)| z).collect()
}

/// log-odds against the target.
fn margin(z: &[f64], target: usize, temperature: f64) -> f64 {
    let (max, log_sum) = log_sum(without(z, target).into_iter(), temperature);
    log_sum + (max - z[target]) / temperature
}

/// log of the sigmoids of x and -x.
fn log_sigmoids(x: f64) -> [f64; 2] {
    [x, -x].map(|x| -((-x).max(0.0) + (-x.abs()).exp().ln_1p()))
}

/// The divergence KL and cross entropy of a token. Nothing of it is split at the target.
fn exact(a: &[f64], b: &[f64], target: usize, temperature: f64, ce_weight: f64) -> Exact {
    let [p, q] = [a, b].map(|z| log_softmax(z, temperature));
    let q_at_1 = log_softmax(b, 1.0);
    let [u, w] = [a, b].map(|z| margin(z, target, temperature));
    let [p_rest, q_rest] = [a, b].map(|z| log_softmax(&without(z, target), temperature));
    let gradient = (0..a.len()).map(|j| {
        let at_target = if j == target { 1.0 } else { 0.0 };
        (q[j].exp() - p[j].exp()) / temperature + ce_weight * (q_at_1[j].exp() - at_target)
    });
    Exact {
        margin: u,
        tkd: kl(&log_sigmoids(u), &log_sigmoids(w)),
        dkd: kl(&p_rest, &q_rest),
        loss: kl(&p, &q) + if ce_weight == 0.0 { 0.0 } else { -ce_weight * q_at_1[target] },
        gradient: gradient.collect(),
    }
}

/// Rows of both models, as float32; their targets.
#[derive(Clone, Default)]
struct Rows {
    vocab: usize,
    teacher: Vec<f32>,
    student: Vec<f32>,
    targets: Vec<i64>,
}

impl Rows {
    fn new(vocab: usize) -> Self {
        Self { vocab, ..Self::default() }
    }

    fn push(&mut self, teacher: &[f32], student: &[f32], target: usize) {
        self.teacher.extend_from_slice(teacher);
        self.student.extend_from_slice(student);
        self.targets.push(target as i64);
    }
}

impl Rows {
    fn keep_third(&mut self, first: usize) {
        let mut third = Self::new(self.vocab);
        for i in (first..self.targets.len()).step_by(3) {
            let row = i * self.vocab..(i + 1) * self.vocab;
            let target = self.targets[i] as usize;
            third.push(&self.teacher[row.clone()], &self.student[row], target);
        }
        *self = third;
    }
}

fn normal(random: &mut fastrand::Rng) -> f32 {
    (0..12).map(|_| random.f32()).sum::<f32>() - 6.0
}

enum Memory {
    F32(Aligned<f32>),
    F16(Aligned<f16>),
    Bf16(Aligned<bf16>),
}

impl Memory {
    fn new(dtype: Dtype, values: &[f32]) -> Self {
        let values = values.iter();
        match dtype {
            Dtype::F32 => Self::F32(values.copied().collect()),
            Dtype::F16 => Self::F16(values.map(|&z| f16::from_f32(z)).collect()),
            Dtype::Bf16 => Self::Bf16(values.map(|&z| bf16::from_f32(z)).collect()),
        }
    }

    fn logits(&self, tokens: usize, vocab: usize) -> Logits<'_> {
        match self {
            Self::F32(v) => Logits::new(&v[..], tokens, vocab),
            Self::F16(v) => Logits::new(&v[..], tokens, vocab),
            Self::Bf16(v) => Logits::new(&v[..], tokens, vocab),
        }
        .unwrap()
    }

    fn logits_mut(&mut self, tokens: usize, vocab: usize) -> LogitsMut<'_> {
        let elements: ElementsMut = match self {
            Self::F32(v) => (&mut v[..]).into(),
            Self::F16(v) => (&mut v[..]).into(),
            Self::Bf16(v) => (&mut v[..]).into(),
        };
        LogitsMut::new(elements, tokens, vocab).unwrap()
    }

    fn wide(&self) -> Vec<f64> {
        match self {
            Self::F32(v) => v.iter().map(|&z| z.into()).collect(),
            Self::F16(v) => v.iter().map(|&z| z.into()).collect(),
            Self::Bf16(v) => v.iter().map(|&z| z.into()).collect(),
        }
    }
}

/// The largest error of each kind over what is allowed.
#[derive(Clone, Copy, Debug, Default)]
struct Worst {
    margin: f64,
    tkd: f64,
    dkd: f64,
    loss: f64,
    gradient: f64,
}

struct Errors {
    worst: Worst,
    output: Output,
    /// The gradient's, relative.
    l2: f64,
}

/// +inf is right where the exact value exceeds float32.
fn ratio(actual: f64, exact: f64, allowed: f64) -> f64 {
    if exact.abs() > f64::from(f32::MAX) && actual == f64::INFINITY.copysign(exact) {
        return 0.0;
    }
    let ratio = (actual - exact).abs() / allowed;
    if ratio.is_nan() { f64::INFINITY } else { ratio }
}

/// Half the distance from a gradient to its neighbours in half precision.
fn half_ulp(dtype: Dtype, value: f64) -> f64 {
    let (digits, lowest) = match dtype {
        Dtype::F32 => return 0.0,
        Dtype::F16 => (10, -14),
        Dtype::Bf16 => (7, -126),
    };
    let exponent = if value == 0.0 { lowest } else { value.abs().log2().floor() as i32 };
    0.5 * 2.0_f64.powi(exponent.max(lowest) - digits)
}

/// The sum over tokens of KL and cross entropy, against [`exact`].
fn errors(
    rows: &Rows,
    dtype: Dtype,
    simulation: Simulation,
    temperature: f64,
    ce_weight: f64,
) -> Errors {
    let (tokens, vocab) = (rows.targets.len(), rows.vocab);
    let [teacher, student] =
        [&rows.teacher, &rows.student].map(|values| Memory::new(dtype, values));
    let mut gradient = Memory::new(dtype, &vec![99.0; tokens * vocab]);
    let objective = Objective::kl()
        .with_temperature(temperature)
        .and_then(|o| o.with_ce_weight(ce_weight))
        .and_then(|o| o.with_reduction(Reduction::Sum))
        .unwrap();
    let batch = Batch::new(teacher.logits(tokens, vocab), &rows.targets).unwrap();
    let mut to = gradient.logits_mut(tokens, vocab);
    let student_logits = student.logits(tokens, vocab);
    let (output, _) = simulation
        .run(&objective, &batch, student_logits, Some(&mut to), Extra::default())
        .unwrap();
    let [teacher, student, gradient] = [teacher, student, gradient].map(|memory| memory.wide());
    let mut worst = Worst::default();
    let (mut squares, mut exact_squares) = (0.0, 0.0);
    for (i, (token, &target)) in output.tokens.iter().zip(&rows.targets).enumerate() {
        let row = i * vocab..(i + 1) * vocab;
        let (a, b) = (&teacher[row.clone()], &student[row.clone()]);
        let exact = exact(a, b, target as usize, temperature, ce_weight);
        let of_value = |value: f64| 2e-6 * (1.0 + value.abs());
        // A target's probability e^-u has the margin's rounding as a relative error.
        let of_tkd = of_value(exact.tkd) + 1e-7 * exact.margin.abs() * exact.tkd;
        let largest = exact.gradient.iter().fold(0.0_f64, |largest, g| largest.max(g.abs()));
        // The kernels' bound, twice the CPU's: their sums are not compensated, and one sure teacher in thousands needs it.
        let floor = 1e-6 * largest + 1e-6 * (1.0 + ce_weight) / temperature;
        let of_gradient = gradient[row].iter().zip(&exact.gradient).map(|(&actual, &exact)| {
            squares += (actual - exact).powi(2);
            exact_squares += exact * exact;
            ratio(actual, exact, floor + half_ulp(dtype, exact))
        });
        let of_row = Worst {
            margin: ratio(token.margin, exact.margin, of_value(exact.margin)),
            tkd: ratio(token.tkd, exact.tkd, of_tkd),
            dkd: ratio(token.dkd, exact.dkd, of_value(exact.dkd)),
            loss: ratio(token.loss, exact.loss, of_value(exact.loss)),
            gradient: of_gradient.fold(0.0, f64::max),
        };
        worst.margin = worst.margin.max(of_row.margin);
        worst.tkd = worst.tkd.max(of_row.tkd);
        worst.dkd = worst.dkd.max(of_row.dkd);
        worst.loss = worst.loss.max(of_row.loss);
        worst.gradient = worst.gradient.max(of_row.gradient);
    }
    Errors { worst, output, l2: (squares / exact_squares).sqrt() }
}

#[track_caller]
fn within(worst: Worst, case: &str) {
    let Worst { margin, tkd, dkd, loss, gradient } = worst;
    let ratios = [margin, tkd, dkd, loss, gradient];
    assert!(ratios.iter().all(|&ratio| ratio <= 1.0), "{case}: {worst:?} of what is allowed");
}

/// Every kernel for rows, alone and in clusters and teams.
fn simulations() -> Vec<(&'static str, Simulation)> {
    let preferring = |row_kernel, team| Simulation {
        preferred: Some(Preference { row_kernel, team }),
        ..Simulation::default()
    };
    let pipelined = |row_kernel, team, teams| {
        let mut simulation = preferring(row_kernel, team);
        simulation.device.multiprocessors = 1;
        simulation.device.pipelined_blocks = team * teams;
        simulation.device.pipelined_wide_blocks = team * teams;
        simulation.device.shared_bytes = 16 << 20;
        simulation
    };
    let mut clusters = preferring(RowKernel::Stream, 0);
    clusters.device.l2_bytes = 1;
    let mut teams = Simulation { block: 32, ..preferring(RowKernel::Stream, 4) };
    teams.device.pipelined_blocks = 0;
    teams.device.pipelined_wide_blocks = 0;
    teams.device.multiprocessors = 4;
    vec![
        ("row_resident", preferring(RowKernel::Resident, 0)),
        ("row_stream in clusters", clusters),
        ("row_stream in teams", teams),
        ("row_pipelined", pipelined(RowKernel::Pipelined, 3, 2)),
        ("row_pipelined_wide", pipelined(RowKernel::PipelinedWide, 2, 1)),
    ]
}

fn lowest(dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => f32::MIN,
        Dtype::F16 => f16::MIN.to_f32(),
        Dtype::Bf16 => bf16::MIN.to_f32(),
    }
}

/// A token for each way to mask, and for each magnitude.
fn masked_and_large(vocab: usize, dtype: Dtype) -> Rows {
    let mut random = fastrand::Rng::with_seed(4);
    let lowest = lowest(dtype);
    let mut rows = Rows::new(vocab);
    let row = |random: &mut fastrand::Rng, of: f32| -> Vec<f32> {
        (0..vocab).map(|_| (of * 2.0 * normal(random)).clamp(lowest, -lowest)).collect()
    };
    for mask in [-1e4, -1e5, -1e6, -1e9, -1e30, f32::MIN] {
        let mask = mask.max(lowest);
        for of in 1..4 {
            for (alone, beyond) in [(false, false), (false, true), (true, false)] {
                let target = random.usize(0..vocab);
                // The last three quarters of the vocabulary, with or without the target; or all but the target.
                let mut masked = |masks: bool| -> Vec<f32> {
                    let mut row = row(&mut random, 1.0);
                    for (j, z) in row.iter_mut().enumerate() {
                        let out = if alone { true } else { j >= vocab / 4 };
                        if masks && out && (j != target || (beyond && j >= vocab / 4)) {
                            *z = mask;
                        }
                    }
                    row
                };
                let (teacher, student) = (masked(of & 1 != 0), masked(of & 2 != 0));
                rows.push(&teacher, &student, target);
            }
        }
    }
    for magnitude in [1e5, 1e6, 1.2e7, 3e8, 3.06e9, 5e9, 1e11, 1e20, 1e30, 1e38, 3.4e38] {
        for of in 1..4 {
            let magnitude = |large: bool| if large { magnitude } else { 1.0 };
            let (teacher, student) = (
                row(&mut random, magnitude(of & 1 != 0)),
                row(&mut random, magnitude(of & 2 != 0)),
            );
            rows.push(&teacher, &student, random.usize(0..vocab));
        }
        // The largest are close to each other, in units of the temperature or not.
        let mut teacher = row(&mut random, 1.0);
        let mut student = row(&mut random, 1.0);
        for (z, at) in [(&mut teacher, 0), (&mut student, 3)] {
            for j in 0..40 {
                let ulp = magnitude * f32::EPSILON;
                z[at + j] = (magnitude - j as f32 * ulp.max(0.25)).clamp(lowest, -lowest);
            }
        }
        rows.push(&teacher, &student, 10);
        rows.push(&teacher, &student, 60);
        let below = |row: &[f32]| -> Vec<f32> {
            row.iter().map(|z| (z - magnitude).clamp(lowest, -lowest)).collect()
        };
        rows.push(&below(&teacher), &student, 10);
        rows.push(&teacher, &below(&student), 60);
    }
    rows
}

#[test]
fn finite_logits_of_any_size() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        for vocab in [61, 2500] {
            let mut rows = masked_and_large(vocab, dtype);
            if vocab > 61 {
                // A third of them for each dtype.
                rows.keep_third(dtype as usize);
            }
            for (kernel, simulation) in simulations() {
                if vocab == 61 && kernel.starts_with("row_pipelined") {
                    continue;
                }
                for (temperature, ce_weight) in [(1.0, 0.5), (0.05, 0.0), (4.0, 0.0), (0.5, 0.25)] {
                    // At another temperature than 1 cross entropy has a sum of its own, and row_stream alone has that.
                    let own_sum = ce_weight != 0.0 && temperature != 1.0;
                    let long_and_warm = vocab > 61 && temperature > 1.0;
                    if (own_sum && !kernel.starts_with("row_stream")) || long_and_warm {
                        continue;
                    }
                    let found = errors(&rows, dtype, simulation, temperature, ce_weight);
                    within(
                        found.worst,
                        &format!("{dtype}, V = {vocab}, {kernel}, T = {temperature}"),
                    );
                }
            }
        }
    }
}

/// The teacher's margins by a kernel of their own.
#[test]
fn margins_of_logits_of_any_size() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        for vocab in [61, 9000] {
            let rows = masked_and_large(vocab, dtype);
            let tokens = rows.targets.len();
            for temperature in [0.05, 1.0, 4.0] {
                let teacher = Memory::new(dtype, &rows.teacher);
                let mut student = Memory::new(dtype, &rows.student);
                let batch = Batch::new(teacher.logits(tokens, vocab), &rows.targets).unwrap();
                let objective = Objective::default().with_temperature(temperature).unwrap();
                let (output, traffic) = Simulation::default()
                    .run_in_place(
                        &objective,
                        &batch,
                        &mut student.logits_mut(tokens, vocab),
                        Extra::default(),
                    )
                    .unwrap();
                assert!(traffic[0].0.starts_with("teacher_margin"), "{}", traffic[0].0);
                let teacher = teacher.wide();
                let exact: Vec<f64> = rows
                    .targets
                    .iter()
                    .enumerate()
                    .map(|(i, &target)| {
                        margin(&teacher[i * vocab..][..vocab], target as usize, temperature)
                    })
                    .collect();
                let least_hard = (0..tokens)
                    .filter(|&i| output.tokens[i].hard)
                    .map(|i| exact[i])
                    .fold(f64::INFINITY, f64::min);
                for (i, token) in output.tokens.iter().enumerate() {
                    let case = format!("{dtype}, V = {vocab}, T = {temperature}, token {i}");
                    let allowed = 2e-6 * (1.0 + exact[i].abs());
                    let (actual, exact) = (token.margin, exact[i]);
                    assert!(ratio(actual, exact, allowed) <= 1.0, "{case}: {actual} {exact}");
                    assert!(token.hard || exact <= least_hard + allowed, "{case}");
                }
            }
        }
    }
}

/// A sure teacher and a student that agrees: p and q are near 1 off the label.
fn sure(vocab: usize, tokens: usize, seed: u64) -> Rows {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut rows = Rows::new(vocab);
    for _ in 0..tokens {
        let mut teacher: Vec<f32> = (0..vocab).map(|_| 4.0 * random.f32() - 2.0).collect();
        let (sure, target) = (random.usize(1..vocab), 0);
        teacher[sure] = 6.0 + 14.0 * random.f32();
        let student: Vec<f32> = teacher.iter().map(|z| z + random.f32() - 0.5).collect();
        rows.push(&teacher, &student, target);
    }
    rows
}

#[test]
fn gradients_of_sure_teachers() {
    for (vocab, tokens) in [(257, 1000), (1000, 500), (2600, 300), (8200, 100)] {
        let rows = sure(vocab, tokens, vocab as u64);
        for (kernel, simulation) in simulations() {
            if vocab < 2048 && kernel.starts_with("row_pipelined") {
                continue;
            }
            let found = errors(&rows, Dtype::F32, simulation, 1.0, 0.0);
            within(found.worst, &format!("V = {vocab}, {kernel}"));
        }
    }
}

/// The student is peaked, so that a probability's own error is all of its gradient's.
#[test]
fn gradients_of_reverse_kl() {
    let (vocab, tokens, temperature) = (2600, 60, 0.3);
    let mut random = fastrand::Rng::with_seed(6);
    let mut logits =
        || -> Vec<f32> { (0..tokens * vocab).map(|_| 2.3 * normal(&mut random)).collect() };
    let (teacher, student) = (logits(), logits());
    let labels = vec![0; tokens];
    let objective = Objective::plain()
        .with_divergence(Divergence::ReverseKl)
        .and_then(|o| o.with_temperature(temperature))
        .and_then(|o| o.with_reduction(Reduction::Sum))
        .unwrap();
    let [a, b] = [&teacher, &student].map(|values| Memory::new(Dtype::F32, values));
    let batch = Batch::new(a.logits(tokens, vocab), &labels).unwrap();
    for (kernel, simulation) in simulations() {
        let mut gradient = Memory::new(Dtype::F32, &vec![99.0; tokens * vocab]);
        let mut to = gradient.logits_mut(tokens, vocab);
        let student = b.logits(tokens, vocab);
        simulation.run(&objective, &batch, student, Some(&mut to), Extra::default()).unwrap();
        let wide = [&a, &b].map(Memory::wide);
        let rows = wide[0].chunks(vocab).zip(wide[1].chunks(vocab));
        let mut worst = 0.0_f64;
        for ((a, b), found) in rows.zip(gradient.wide().chunks(vocab)) {
            let [log_p, log_q] = [a, b].map(|row| log_softmax(row, temperature));
            let divergence = kl(&log_q, &log_p);
            let exact: Vec<f64> = log_q
                .iter()
                .zip(&log_p)
                .map(|(q, p)| q.exp() * (q - p - divergence) / temperature)
                .collect();
            let largest = exact.iter().fold(0.0_f64, |largest, g| largest.max(g.abs()));
            let allowed = 1e-6 * largest + 1e-6 / temperature;
            let of_row =
                found.iter().zip(&exact).map(|(&found, &exact)| ratio(found, exact, allowed));
            worst = of_row.fold(worst, f64::max);
        }
        assert!(worst <= 1.0, "{kernel}: {worst} of what is allowed");
    }
}

/// A probability below float32's normal numbers times a gap near its largest.
#[test]
fn a_tiny_probability_times_a_huge_gap() {
    let (teacher, student) = ([0.0, 0.0, -1.7e37, 1.7e37], [0.0, 0.0, -88.5, -88.5_f32]);
    let [p, q] = [&teacher, &student]
        .map(|row: &[f32; 4]| log_softmax(&without(&row.map(f64::from), 0), 1.0));
    let divergence = kl(&q, &p);
    let objective = Objective::dkd()
        .with_divergence(Divergence::ReverseKl)
        .and_then(|o| o.with_reduction(Reduction::Sum))
        .unwrap();
    let batch = Batch::new(Logits::new(&teacher[..], 1, 4).unwrap(), &[0]).unwrap();
    let mut gradient = [99.0_f32; 4];
    let mut to = LogitsMut::new(&mut gradient[..], 1, 4).unwrap();
    let student = Logits::new(&student[..], 1, 4).unwrap();
    let extra = Extra::default();
    Simulation::default().run(&objective, &batch, student, Some(&mut to), extra).unwrap();
    for j in 0..3 {
        let exact = q[j].exp() * (q[j] - p[j] - divergence);
        let found = f64::from(gradient[j + 1]);
        assert!((found - exact).abs() < 1e-6, "{found} instead of {exact}");
    }
    assert!(gradient[2] > 0.06);
}

/// Rows of a teacher of N(0, 3) and of a student that differs by N(0, difference).
fn close(vocab: usize, tokens: usize, difference: f32) -> Rows {
    let mut random = fastrand::Rng::with_seed(vocab as u64 + 1);
    let mut rows = Rows::new(vocab);
    for _ in 0..tokens {
        let teacher: Vec<f32> = (0..vocab).map(|_| 3.0 * normal(&mut random)).collect();
        let student: Vec<f32> =
            teacher.iter().map(|z| z + difference * normal(&mut random)).collect();
        let target = random.usize(0..vocab);
        rows.push(&teacher, &student, target);
    }
    rows
}

impl Rows {
    /// The exact terms of each token.
    fn exact(&self, temperature: f64) -> Vec<Exact> {
        let wide = |row: &[f32]| -> Vec<f64> { row.iter().map(|&z| z.into()).collect() };
        let rows = self.teacher.chunks(self.vocab).zip(self.student.chunks(self.vocab));
        rows.zip(&self.targets)
            .map(|((a, b), &target)| exact(&wide(a), &wide(b), target as usize, temperature, 0.0))
            .collect()
    }
}

/// The loss of a call is within 1e-6 of itself + 2e-7, before T^2 multiplies it.
#[test]
fn losses_at_high_temperatures() {
    for (vocab, tokens) in [(513, 16), (1000, 16), (8000, 8)] {
        for difference in [1.0, 0.1] {
            let rows = close(vocab, tokens, difference);
            for temperature in [1.0, 4.0, 8.0, 10.0, 20.0] {
                let exact: f64 = rows.exact(temperature).iter().map(|exact| exact.loss).sum();
                for (kernel, simulation) in simulations() {
                    let found = errors(&rows, Dtype::F32, simulation, temperature, 0.0);
                    let error = (found.output.loss - exact).abs() / tokens as f64;
                    let allowed = 1e-6 * exact / tokens as f64 + 2e-7;
                    let case =
                        format!("V = {vocab}, {difference} apart, {kernel}, T = {temperature}");
                    assert!(error <= allowed, "{case}: {error:e} of {allowed:e}");
                }
            }
        }
    }
}

/// If the models all but agree, a token's DKD is as often below what is exact as above it: the mean of many is right.
#[test]
fn means_of_close_models() {
    let tokens = 400;
    for difference in [1e-3, 1e-4] {
        let rows = close(300, tokens, difference);
        let exact: f64 = rows.exact(1.0).iter().map(|exact| exact.dkd).sum();
        for (kernel, simulation) in simulations() {
            let found = errors(&rows, Dtype::F32, simulation, 1.0, 0.0);
            let dkd: f64 = found.output.tokens.iter().map(|token| token.dkd).sum();
            let error = (dkd - exact) / tokens as f64;
            assert!(error.abs() < 1.5e-8, "{difference} apart, {kernel}: {error:e}");
        }
    }
}

#[test]
fn gradients_of_close_models() {
    for (difference, allowed) in [(1e-1, 7e-6), (1e-2, 7e-5), (1e-3, 6e-4), (1e-4, 6e-3)] {
        let rows = close(8000, 3, difference);
        for (kernel, simulation) in simulations() {
            let found = errors(&rows, Dtype::F32, simulation, 1.0, 0.0);
            let case = format!("{difference} apart, {kernel}");
            assert!(found.l2 <= allowed, "{case}: {:e} of {allowed:e}", found.l2);
        }
    }
}
