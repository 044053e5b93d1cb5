//! Layers, and what is exact for them: float64 of the products and the definitions.

use atkd::head::Layer;
use atkd::{
    Batch, Divergence, Elements, Logits, Objective, Output, Reduction, SelectionRule, Target,
    reference,
};
use half::{bf16, f16};

/// Tokens, vocabulary, the models' hidden sizes.
pub const N: usize = 60;
pub const V: usize = 50;
pub const H: usize = 16;
pub const TEACHER_H: usize = 24;

/// The errors that are allowed: of a loss relative to it, and of a gradient relative to its largest element.
pub const LOSS: f64 = 1e-5;
pub const GRADIENT: f64 = 2e-5;

/// Numbers of one of the three dtypes.
#[derive(Clone)]
pub enum Data {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Data {
    pub fn elements(&self) -> Elements<'_> {
        match self {
            Data::F32(v) => v.into(),
            Data::F16(v) => v.into(),
            Data::Bf16(v) => v.into(),
        }
    }

    pub fn wide(&self) -> Vec<f64> {
        let elements = self.elements();
        (0..elements.len()).map(|i| elements.get(i).into()).collect()
    }

    pub fn to_f16(&self) -> Self {
        Data::F16(self.wide().into_iter().map(f16::from_f64).collect())
    }

    pub fn to_bf16(&self) -> Self {
        Data::Bf16(self.wide().into_iter().map(bf16::from_f64).collect())
    }
}

/// A model's hidden states, weight and bias.
#[derive(Clone)]
pub struct Model {
    pub hidden: Data,
    pub weight: Data,
    pub bias: Option<Data>,
    pub features: usize,
}

impl Model {
    pub fn layer(&self) -> Layer<'_> {
        let layer = Layer::new(self.hidden.elements(), self.weight.elements(), self.features);
        let layer = layer.unwrap();
        match &self.bias {
            Some(bias) => layer.with_bias(bias.elements()).unwrap(),
            None => layer,
        }
    }

    pub fn map(&self, to: fn(&Data) -> Data) -> Self {
        let Self { hidden, weight, bias, features } = self;
        let bias = bias.as_ref().map(to);
        Self { hidden: to(hidden), weight: to(weight), bias, features: *features }
    }

    /// The logits, whose rounding to float32 alone is an error.
    pub fn logits(&self) -> Vec<f32> {
        let (hidden, weight) = (self.hidden.wide(), self.weight.wide());
        let bias = self.bias.as_ref().map(Data::wide);
        let mut logits = Vec::new();
        for hidden in hidden.chunks(self.features) {
            for (word, weight) in weight.chunks(self.features).enumerate() {
                let product: f64 = hidden.iter().zip(weight).map(|(h, w)| h * w).sum();
                logits.push((product + bias.as_ref().map_or(0.0, |bias| bias[word])) as f32);
            }
        }
        logits
    }
}

/// The settings beside the objective.
#[derive(Clone, Copy, Default)]
pub struct With<'a> {
    pub sequences: Option<&'a [usize]>,
    pub hard: Option<&'a [bool]>,
    pub weights: Option<&'a [f32]>,
    pub temperatures: Option<&'a [f32]>,
}

pub struct Problem {
    pub student: Model,
    pub teacher: Model,
    pub labels: Vec<i64>,
    /// The size of the vocabulary, if that is not the rows of both weights.
    pub vocab: Option<usize>,
}

/// Loss and terms, and the gradients of hidden states, weight and bias.
pub struct Results {
    pub output: Output,
    pub gradients: [Vec<f64>; 3],
}

pub fn normal(random: &mut fastrand::Rng, count: usize, scale: f64) -> Data {
    let mut one = || 3f64.sqrt() * (0..4).map(|_| random.f64() - 0.5).sum::<f64>();
    Data::F32((0..count).map(|_| (scale * one()) as f32).collect())
}

pub fn model(
    random: &mut fastrand::Rng,
    [tokens, vocab, features]: [usize; 3],
    scale: f64,
) -> Model {
    let hidden = normal(random, tokens * features, 1.0);
    let weight = normal(random, vocab * features, scale);
    Model { hidden, weight, bias: Some(normal(random, vocab, 1.0)), features }
}

impl Problem {
    /// A fifth of the tokens are ignored.
    pub fn new() -> Self {
        Self::of([N, V], [H, TEACHER_H], 1)
    }

    pub fn of(
        [tokens, vocab]: [usize; 2],
        [features, teacher_features]: [usize; 2],
        seed: u64,
    ) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let student = model(&mut random, [tokens, vocab, features], 0.7);
        let teacher = model(&mut random, [tokens, vocab, teacher_features], 0.6);
        let label = |token: usize, random: &mut fastrand::Rng| match token % 5 {
            0 => -100,
            _ => random.i64(0..vocab as i64),
        };
        let labels = (0..tokens).map(|token| label(token, &mut random)).collect();
        Self { student, teacher, labels, vocab: None }
    }

    pub fn vocab(&self) -> usize {
        self.vocab.unwrap_or_else(|| self.teacher.layer().vocab())
    }

    pub fn exactly(&self, objective: &Objective, with: With) -> Results {
        let (output, of_logits) = self.of_logits(objective, with);
        Results { output, gradients: self.gradients(&of_logits, |x| x) }
    }

    /// Loss, terms, and the gradient of the logits.
    pub fn of_logits(&self, objective: &Objective, with: With) -> (Output, Vec<f64>) {
        let (tokens, vocab) = (self.labels.len(), self.vocab());
        let (student, teacher) = (self.student.logits(), self.teacher.logits());
        let mut batch =
            Batch::new(Logits::new(&teacher, tokens, vocab).unwrap(), &self.labels).unwrap();
        if let Some(sequences) = with.sequences {
            batch = batch.with_sequences(sequences).unwrap();
        }
        if let Some(hard) = with.hard {
            batch = batch.with_hard(hard).unwrap();
        }
        if let Some(weights) = with.weights {
            batch = batch.with_token_weights(weights).unwrap();
        }
        if let Some(temperatures) = with.temperatures {
            batch = batch.with_temperatures(temperatures).unwrap();
        }
        let student = Logits::new(&student, tokens, vocab).unwrap();
        reference::forward_backward(objective, &batch, student).unwrap()
    }

    /// The gradients of hidden states, weight and bias, whose numbers are mapped.
    pub fn gradients(&self, of_logits: &[f64], map: fn(f64) -> f64) -> [Vec<f64>; 3] {
        let (vocab, features) = (self.vocab(), self.student.features);
        let hidden: Vec<f64> = self.student.hidden.wide().into_iter().map(map).collect();
        let weight: Vec<f64> = self.student.weight.wide().into_iter().map(map).collect();
        let mut gradients = [vec![0.0; hidden.len()], vec![0.0; weight.len()], vec![0.0; vocab]];
        for token in 0..self.labels.len() {
            for word in 0..vocab {
                let gradient = of_logits[token * vocab + word];
                gradients[2][word] += gradient;
                for i in 0..features {
                    let (at, of) = (token * features + i, word * features + i);
                    gradients[0][at] += gradient * weight[of];
                    gradients[1][of] += gradient * hidden[at];
                }
            }
        }
        gradients
    }
}

#[track_caller]
pub fn compare(found: &Results, exact: &Results) {
    compare_output(&found.output, &exact.output);
    close(&found.gradients, &exact.gradients, GRADIENT);
}

#[track_caller]
pub fn compare_output(found: &Output, exact: &Output) {
    let (loss, of_loss) = (found.loss, exact.loss);
    assert!((loss - of_loss).abs() <= LOSS * of_loss.abs(), "loss {loss}, but {of_loss}");
    for (token, (found, exact)) in found.tokens.iter().zip(&exact.tokens).enumerate() {
        assert_eq!((found.hard, found.valid), (exact.hard, exact.valid), "token {token}");
        let terms = |t: &atkd::TokenTerms| [t.tkd, t.dkd, t.uncertainty, t.loss];
        for (found, exact) in terms(found).into_iter().zip(terms(exact)) {
            let close = (found - exact).abs() <= LOSS * (1.0 + exact.abs());
            assert!(close || found.is_nan() && exact.is_nan(), "token {token}: {found}, {exact}");
        }
    }
}

#[track_caller]
pub fn close(found: &[Vec<f64>; 3], exact: &[Vec<f64>; 3], allowed: f64) {
    for ((found, exact), of) in found.iter().zip(exact).zip(["hidden states", "weight", "bias"]) {
        let largest = exact.iter().fold(0.0, |largest: f64, g| largest.max(g.abs()));
        let error = error(found, exact);
        assert!(error <= allowed * largest, "{of}: off by {error}, the largest is {largest}");
    }
}

/// The largest difference; NaN if there is one.
pub fn error(found: &[f64], exact: &[f64]) -> f64 {
    assert_eq!(found.len(), exact.len());
    let differences = found.iter().zip(exact).map(|(found, exact)| (found - exact).abs());
    differences.fold(0.0, |most, each| if each <= most { most } else { each })
}

/// Random weights and temperatures of the tokens, and which are hard.
pub fn values_of_tokens() -> (Vec<f32>, Vec<f32>, Vec<bool>) {
    let mut random = fastrand::Rng::with_seed(4);
    let weights = (0..N).map(|_| 3.0 * random.f32() - 1.0).collect();
    let temperatures = (0..N).map(|_| 0.5 + random.f32()).collect();
    (weights, temperatures, (0..N).map(|_| random.bool()).collect())
}

pub fn objectives() -> Vec<Objective> {
    let default = Objective::default;
    let divergence = |of: Objective, divergence| of.with_divergence(divergence).unwrap();
    let reduction = |of: Objective, reduction| of.with_reduction(reduction).unwrap();
    let group_mean = reduction(default(), Reduction::GroupMean);
    vec![
        default(),
        divergence(default(), Divergence::ReverseKl).with_hard_ratio(0.3).unwrap(),
        divergence(default(), Divergence::Jsd { beta: 0.5 })
            .with_ce_weight(0.3)
            .and_then(|o| o.with_temperature(2.0))
            .unwrap()
            .with_temperature_squared(true),
        divergence(Objective::plain(), Divergence::TotalVariation),
        divergence(Objective::plain(), Divergence::SkewKl { alpha: 0.1 }),
        Objective::kl().with_ce_weight(1.0).and_then(|o| o.with_kd_weight(0.5)).unwrap(),
        reduction(Objective::dkd(), Reduction::Sum),
        reduction(Objective::atkd(0.4).unwrap(), Reduction::Sum),
        group_mean,
        group_mean.with_ce_weight(0.4).unwrap(),
        group_mean.with_selection_rule(SelectionRule::Median).with_ce_weight(0.4).unwrap(),
        default().with_selection_rule(SelectionRule::Median),
        default().with_target(Target::Teacher),
        reduction(default(), Reduction::Denominator(17.0)).with_upstream_gradient(3.0).unwrap(),
        default().with_hard_ratio(0.0).unwrap(),
        default().with_hard_ratio(1.0).unwrap(),
    ]
}
