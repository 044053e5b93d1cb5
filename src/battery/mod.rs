//! The test battery that every backend must pass: each shape, dtype and edge case against the float64
//! [`reference`](mod@reference), and the reference against finite differences and identities.
//!
//! The errors that a backend is allowed, as functions in [`compare`]:
//!
//! | what | allowed error |
//! |---|---|
//! | loss | 1e-6 relative (2e-6, a token's own, if a finite logit is beyond 50 in size) + 2e-7 absolute, times T^2 where the distillation terms are and that is above 1 |
//! | TKD, DKD, UNC, margin, loss of a token | 2e-6 (1 + \|value\|), of the loss 2e-6 T^2 likewise |
//! | float32 gradient | 1e-6 of the row's largest + 5e-7 (the kernels: 1e-6) (kd_weight [T^2] + ce_weight) scale / T |
//! | float16 and bfloat16 gradient | that, plus half a unit in the last place of the exact gradient |
//! | gradient of total variation | that, and any subgradient where \|p - q\| <= 2e-6 max(p, q): [`compare::ties`] |
//! | selection of valid and hard tokens; NaN and infinities | none, but a value beyond its dtype may be infinite |

mod aligned;
mod case;
mod cases;
pub mod compare;
mod divergences;
mod edges;
mod paper;
pub mod settings;
pub mod shards;
pub mod sparse;

use half::{bf16, f16};

use crate::{Batch, ElementsMut, Logits, LogitsMut, Objective, Output, Result, Target, reference};
pub use aligned::Aligned;
use case::{Case, random};
use cases::{
    close_models, objective_cases, objectives, selections, shapes, sure_teachers, temperatures,
    token_temperatures, token_weights,
};
use compare::Worst;
use divergences::{DIVERGENCES, all_objectives};
use edges::{edges, finite_masks, magnitudes};
use paper::{PAPER_TOKENS, by_the_paper, differences, identities, paper, textbook_terms};

/// [`reference::forward_backward`] with the gradient rounded to the dtype that is asked for.
pub fn reference_backend(
    objective: &Objective,
    batch: &Batch,
    student: Logits,
    mut gradient: LogitsMut,
) -> Result<Output> {
    let (output, exact) = reference::forward_backward(objective, batch, student)?;
    for (mut row, exact) in gradient.rows().into_iter().zip(exact.chunks(student.vocab())) {
        for (j, &value) in exact.iter().enumerate() {
            match &mut row {
                ElementsMut::F32(row) => row[j] = value as f32,
                ElementsMut::F16(row) => row[j] = f16::from_f64(value),
                ElementsMut::Bf16(row) => row[j] = bf16::from_f64(value),
            }
        }
    }
    Ok(output)
}

/// The outcome of one case.
#[derive(Clone, Debug)]
pub struct Check {
    /// The kind of case.
    pub group: &'static str,
    /// The case's name within the group.
    pub case: String,
    /// The largest error, as a share of what is allowed. The case failed if it is above 1.
    pub worst: f64,
    /// The value that had it, in words and numbers.
    pub detail: String,
}

impl Check {
    /// True if every error was within what is allowed.
    pub fn passed(&self) -> bool {
        self.worst <= 1.0
    }
}

/// Fails a test whose checks have not all passed.
///
/// # Panics
/// If a case failed, with the first 40 that did.
pub fn assert_all_pass(checks: &[Check]) {
    let failed: Vec<&Check> = checks.iter().filter(|check| !check.passed()).collect();
    let lines = failed.iter().take(40).map(|check| {
        let Check { group, case, worst, detail } = check;
        format!("{group} / {case}: {worst:.3} of the bound, {detail}")
    });
    let shown = lines.collect::<Vec<_>>().join("\n");
    assert!(failed.is_empty(), "{} of {} cases failed:\n{shown}", failed.len(), checks.len());
}

type Group = (&'static str, fn() -> Vec<Case>);

/// The cases that a backend runs.
const GROUPS: [Group; 20] = [
    ("shapes, dtypes, strides", shapes),
    ("objectives", objective_cases),
    ("selection", selections),
    ("edge cases", edges),
    ("finite masks", finite_masks),
    ("magnitudes", magnitudes),
    ("temperatures", temperatures),
    ("token weights", token_weights),
    ("token temperatures", token_temperatures),
    ("close models", close_models),
    ("sure teachers", sure_teachers),
    ("divergences: shapes, dtypes", divergences::shapes),
    ("divergences: objectives", divergences::objectives),
    ("divergences: small shares", divergences::small_shares),
    ("divergences: edge cases", divergences::edges),
    ("divergences: finite masks", divergences::finite_masks),
    ("divergences: magnitudes", divergences::magnitudes),
    ("divergences: temperatures", divergences::temperatures),
    ("divergences: close models", divergences::close_models),
    ("divergences: sure teachers", divergences::sure_teachers),
];

/// The bounds that a backend's gradients are held to: those of the table above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bounds {
    /// These are those of the CPU and the reference.
    Cpu,
    /// These are those of the CUDA kernels, whose sums are in single precision and not compensated.
    Kernels,
}

/// Runs every case on a backend, a function as
/// [`cpu::forward_backward`](crate::cpu::forward_backward), and tells `report` of each as it ends.
pub fn run(
    bounds: Bounds,
    backend: impl Fn(&Objective, &Batch, Logits, LogitsMut) -> Result<Output>,
    mut report: impl FnMut(&Check),
) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut add = |group, case: String, worst: Worst| {
        let check = Check { group, case, worst: worst.ratio, detail: worst.detail };
        report(&check);
        checks.push(check);
    };
    for (name, objective) in differentiated() {
        // Differences cannot see the teacher's arg max in place of labels; identities need labels.
        let case = random(4, 7, 31).with(objective.map(|o| o.with_target(Target::Label)));
        add("reference: finite differences", name, caught(differences(&case)));
    }
    for seed in 0..SEEDS {
        let case = random(3, 23, seed);
        for (name, divergence) in DIVERGENCES {
            let worst = caught(textbook_terms(&case, divergence));
            add("reference: textbook terms", format!("{name}, seed {seed}"), worst);
        }
        add("reference: identities", format!("seed {seed}"), caught(identities(&case)));
    }
    for paper in paper() {
        for tokens in PAPER_TOKENS {
            let case = format!("{}, {tokens} tokens", paper.name);
            add("reference: the paper's table", case, caught(by_the_paper(&paper, tokens)));
        }
    }
    for (group, cases) in GROUPS {
        for case in cases() {
            let worst = case.run(bounds, &backend);
            add(group, case.name, worst);
        }
    }
    checks
}

fn caught(worst: Result<Worst>) -> Worst {
    worst.unwrap_or_else(|error| Worst::fail(format!("error: {error}")))
}

/// Seeds of the cases by which the reference is compared with textbook formulas.
const SEEDS: u64 = 8;

/// The objectives whose gradient is compared with finite differences.
fn differentiated() -> Vec<(String, Result<Objective>)> {
    let forward = objectives().into_iter().map(|(name, objective)| (name.into(), objective));
    forward.chain(all_objectives()).collect()
}

/// Cases that [`run`] goes through, for a progress bar.
pub fn len() -> usize {
    differentiated().len()
        + SEEDS as usize * (DIVERGENCES.len() + 1)
        + paper().len() * PAPER_TOKENS.len()
        + GROUPS.iter().map(|(_, cases)| cases().len()).sum::<usize>()
}
