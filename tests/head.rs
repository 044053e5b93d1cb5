//! The loss from hidden states and weights, against float64 of the products and the definitions.

mod layers;

use atkd::head::{self, Chunks, Gradients, Layer};
use atkd::{ElementsMut, Error, Objective, Output, cpu};
use cpu::Session;
use half::bf16;
use layers::*;

impl Problem {
    fn session<'a>(&'a self, objective: &Objective, with: With<'a>) -> Session<'a> {
        let mut session = Session::begin(objective, &self.labels, self.vocab()).unwrap();
        if let Some(sequences) = with.sequences {
            session = session.with_sequences(sequences).unwrap();
        }
        if let Some(hard) = with.hard {
            session = session.with_hard(hard).unwrap();
        }
        if let Some(weights) = with.weights {
            session = session.with_token_weights(weights).unwrap();
        }
        if let Some(temperatures) = with.temperatures {
            session = session.with_temperatures(temperatures).unwrap();
        }
        session
    }

    fn found(&self, session: Session, chunks: Chunks) -> Results {
        let layer = self.student.layer();
        let rows = self.student.weight.elements().len() / self.student.features;
        let mut hidden = vec![f32::NAN; self.student.hidden.elements().len()];
        let mut weight = vec![f32::NAN; rows * self.student.features];
        let mut bias = vec![f32::NAN; rows];
        let gradients = Gradients {
            hidden: Some((&mut hidden).into()),
            weight: Some(&mut weight),
            bias: Some(&mut bias),
        };
        let output = head::loss(session, &layer, &self.teacher.layer(), chunks, gradients).unwrap();
        let gradients = [hidden, weight, bias];
        Results { output, gradients: gradients.map(|g| g.into_iter().map(f64::from).collect()) }
    }

    #[track_caller]
    fn check(&self, objective: &Objective, with: With, chunk: usize) {
        let exact = self.exactly(objective, with);
        let found = self.found(self.session(objective, with), Chunks::Tokens(chunk));
        compare(&found, &exact);
    }
}

#[test]
fn objectives_in_chunks() {
    let problem = Problem::new();
    for objective in objectives() {
        for chunk in [1, 7, N, 1000] {
            problem.check(&objective, With::default(), chunk);
        }
    }
}

#[test]
fn sequences() {
    let problem = Problem::new();
    let with = With { sequences: Some(&[0, 12, 12, 31, N]), ..With::default() };
    for objective in objectives() {
        problem.check(&objective, with, 7);
    }
}

#[test]
fn settings_of_tokens() {
    let problem = Problem::new();
    let (weights, temperatures, hard) = values_of_tokens();
    let own =
        With { weights: Some(&weights), temperatures: Some(&temperatures), ..With::default() };
    for objective in objectives() {
        problem.check(&objective, own, 7);
        problem.check(&objective, With { hard: Some(&hard), ..own }, 7);
    }
}

/// Margins that rise, or fall, from token to token, so that half of the predictions are wrong.
#[test]
fn wrong_predictions_are_repaired() {
    for falls in [false, true] {
        let mut problem = Problem::new();
        problem.teacher.hidden = Data::F32(vec![0.0; N * TEACHER_H]);
        let Some(Data::F32(bias)) = &mut problem.teacher.bias else { unreachable!() };
        // The margin of a token is the larger the smaller its label's bias is.
        bias.iter_mut().enumerate().for_each(|(word, bias)| *bias = 0.1 * word as f32);
        for (token, label) in problem.labels.iter_mut().enumerate().filter(|(_, l)| **l >= 0) {
            *label = (if falls { token } else { N - 1 - token } * V / N) as i64;
        }
        // Tokens of one label are equal to the bit: the lower ones are hard, in any chunks.
        for objective in objectives() {
            for chunk in [1, 7] {
                problem.check(&objective, With::default(), chunk);
            }
        }
    }
}

#[test]
fn known_log_probabilities_select() {
    let problem = Problem::new();
    let objective = Objective::default();
    let exact = problem.exactly(&objective, With::default());
    let log_probs: Vec<f32> =
        exact.output.tokens.iter().map(|token| (1.0 - token.uncertainty).ln() as f32).collect();
    let session = problem.session(&objective, With::default());
    let session = session.with_teacher_log_probs(&log_probs).unwrap();
    compare(&problem.found(session, Chunks::Tokens(7)), &exact);

    // The margins tell tokens apart here that their probabilities would not.
    let backwards: Vec<f32> = (0..N).map(|token| -1e-3 * (1.0 + token as f32)).collect();
    let session = problem.session(&objective, With::default());
    let session = session.with_teacher_log_probs(&backwards).unwrap();
    let found = problem.found(session, Chunks::Tokens(7));
    let hard: Vec<bool> = found.output.tokens.iter().map(|token| token.hard).collect();
    let valid: Vec<bool> = found.output.tokens.iter().map(|token| token.valid).collect();
    let margins: Vec<f32> = (0..N).map(|token| token as f32).collect();
    assert_eq!(hard, atkd::select_hard(&margins, Some(&valid), 0.5, None).unwrap());

    let mut wrong = log_probs;
    wrong[1] = 1.0;
    let session = problem.session(&objective, With::default());
    let error = session.with_teacher_log_probs(&wrong).err().unwrap().to_string();
    assert!(error.contains("token 1 is 1"), "{error}");
}

#[test]
fn half_precision() {
    for to in [Data::to_f16, Data::to_bf16] {
        for teacher_too in [false, true] {
            let mut problem = Problem::new();
            problem.student = problem.student.map(to);
            if teacher_too {
                problem.teacher = problem.teacher.map(to);
            }
            for chunk in [7, N] {
                problem.check(&Objective::default(), With::default(), chunk);
            }
        }
    }
}

/// Weights of more than a tile, in each direction, none a multiple of one.
#[test]
fn more_than_a_tile() {
    let mut problem = Problem::of([270, 600], [1030, 300], 2);
    for to_half in [false, true] {
        if to_half {
            problem.student = problem.student.map(Data::to_bf16);
            problem.teacher = problem.teacher.map(Data::to_f16);
        }
        // A hidden size of 1030 makes logits of 30 and more, as no model has.
        let scale = |data: &mut Data| {
            *data = match data {
                Data::F32(v) => Data::F32(v.iter().map(|x| 0.1 * x).collect()),
                Data::F16(v) => Data::F16(v.clone()),
                Data::Bf16(v) => Data::Bf16(v.clone()),
            }
        };
        scale(&mut problem.student.weight);
        scale(&mut problem.teacher.weight);
        problem.check(&Objective::default(), With::default(), 270);
    }
}

#[test]
fn gradients_in_half_precision_are_rounded_once() {
    let mut problem = Problem::new();
    problem.student = problem.student.map(Data::to_bf16);
    let objective = Objective::default();
    let exact = problem.exactly(&objective, With::default());
    let mut hidden = vec![bf16::NAN; N * H];
    let gradients =
        Gradients { hidden: Some(ElementsMut::from(&mut hidden)), ..Gradients::default() };
    let (student, teacher) = (problem.student.layer(), problem.teacher.layer());
    let session = problem.session(&objective, With::default());
    head::loss(session, &student, &teacher, Chunks::Tokens(7), gradients).unwrap();
    let largest = exact.gradients[0].iter().fold(0.0, |most: f64, g| most.max(g.abs()));
    for (found, exact) in hidden.iter().zip(&exact.gradients[0]) {
        let error = (f64::from(*found) - exact).abs();
        assert!(error <= 2f64.powi(-8) * exact.abs() + GRADIENT * largest, "{found}, {exact}");
    }
}

#[test]
fn only_what_is_wanted_is_written() {
    let problem = Problem::new();
    let objective = Objective::default();
    let exact = problem.exactly(&objective, With::default());
    let (student, teacher) = (problem.student.layer(), problem.teacher.layer());
    for wanted in 0..8 {
        let mut hidden = vec![f32::NAN; N * H];
        let mut weight = vec![f32::NAN; V * H];
        let mut bias = vec![f32::NAN; V];
        let gradients = Gradients {
            hidden: (wanted & 1 != 0).then(|| (&mut hidden).into()),
            weight: (wanted & 2 != 0).then_some(&mut weight[..]),
            bias: (wanted & 4 != 0).then_some(&mut bias[..]),
        };
        let session = problem.session(&objective, With::default());
        let output = head::loss(session, &student, &teacher, Chunks::Tokens(7), gradients).unwrap();
        assert!((output.loss - exact.output.loss).abs() <= LOSS * exact.output.loss);
        for (i, (found, exact)) in
            [hidden, weight, bias].into_iter().zip(&exact.gradients).enumerate()
        {
            let found: Vec<f64> = found.into_iter().map(f64::from).collect();
            if wanted & 1 << i != 0 {
                let largest = exact.iter().fold(0.0, |most: f64, g| most.max(g.abs()));
                assert!(error(&found, exact) <= GRADIENT * largest);
            } else {
                assert!(found.iter().all(|g| g.is_nan()));
            }
        }
    }
}

#[test]
fn padded_vocabularies() {
    let problem = Problem::new();
    let objective = Objective::default();
    let exact = problem.exactly(&objective, With::default());
    let padded = |data: &Data, count: usize| {
        let Data::F32(v) = data else { unreachable!() };
        Data::F32([&v[..], &vec![9.0; count]].concat())
    };
    let pad = |model: &Model, rows: usize| Model {
        weight: padded(&model.weight, rows * model.features),
        bias: model.bias.as_ref().map(|bias| padded(bias, rows)),
        ..model.clone()
    };
    let (student, teacher) = (pad(&problem.student, 3), pad(&problem.teacher, 14));
    let mut hidden = vec![f32::NAN; N * H];
    let mut weight = vec![f32::NAN; (V + 3) * H];
    let mut bias = vec![f32::NAN; V + 3];
    let gradients = Gradients {
        hidden: Some((&mut hidden).into()),
        weight: Some(&mut weight),
        bias: Some(&mut bias),
    };
    let session = problem.session(&objective, With::default());
    let (student, teacher) =
        (student.layer().with_vocab(V).unwrap(), teacher.layer().with_vocab(V).unwrap());
    let output = head::loss(session, &student, &teacher, Chunks::Tokens(7), gradients).unwrap();
    assert!(weight.drain(V * H..).chain(bias.drain(V..)).all(|g| g == 0.0));
    let gradients = [hidden, weight, bias].map(|g| g.into_iter().map(f64::from).collect());
    compare(&Results { output, gradients }, &exact);
}

#[test]
fn tokens_that_are_equal() {
    let mut problem = Problem::new();
    for model in [&mut problem.student, &mut problem.teacher] {
        let features = model.features;
        let Data::F32(hidden) = &mut model.hidden else { unreachable!() };
        let one = hidden[41 * features..42 * features].to_vec();
        (10..40).for_each(|token| hidden[token * features..][..features].copy_from_slice(&one));
    }
    let label = problem.labels[41];
    problem.labels[10..40].fill(label);
    let objective = Objective::default();
    let exact = problem.exactly(&objective, With::default());
    let found = problem.found(problem.session(&objective, With::default()), Chunks::Tokens(4));
    // The last bits of their margins decide which of them are hard.
    let tokens = &found.output.tokens;
    let margins: Vec<f32> = tokens.iter().map(|token| token.margin as f32).collect();
    let valid: Vec<bool> = tokens.iter().map(|token| token.valid).collect();
    let hard: Vec<bool> = tokens.iter().map(|token| token.hard).collect();
    assert_eq!(hard, atkd::select_hard(&margins, Some(&valid), 0.5, None).unwrap());
    let number = |output: &Output| output.summary().hard_tokens;
    assert_eq!(number(&found.output), number(&exact.output));
    assert!((found.output.loss - exact.output.loss).abs() <= LOSS * exact.output.loss);
    close_sums(&found, &exact);
}

/// The sums over tokens, which do not depend on which of equal tokens are hard.
#[track_caller]
fn close_sums(found: &Results, exact: &Results) {
    for i in [1, 2] {
        let largest = exact.gradients[i].iter().fold(0.0, |most: f64, g| most.max(g.abs()));
        assert!(error(&found.gradients[i], &exact.gradients[i]) <= GRADIENT * largest);
    }
}

#[test]
fn bits_do_not_depend_on_threads_or_on_calls_before() {
    let problem = Problem::of([270, 600], [70, 30], 3);
    let objective = Objective::default();
    let run = || {
        let found = problem.found(problem.session(&objective, With::default()), Chunks::Tokens(50));
        (found.output, found.gradients)
    };
    let first = run();
    assert_eq!(run(), first);
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert_eq!(pool.install(run), first);
    }
}

/// Padding behind a masked row of attention: its hidden states are NaN.
#[test]
fn ignored_tokens_are_left_out() {
    let mut problem = Problem::new();
    problem.labels[4] = -100;
    problem.labels[31] = -100;
    let objective = Objective::default();
    let exact = problem.exactly(&objective, With::default());
    let clean = [problem.student.hidden.clone(), problem.teacher.hidden.clone()];
    for model in [&mut problem.student, &mut problem.teacher] {
        let features = model.features;
        let Data::F32(hidden) = &mut model.hidden else { panic!("they are float32") };
        for token in [4, 31] {
            hidden[token * features..][..features].fill(f32::NAN);
        }
    }
    assert!(problem.student.hidden.wide() != clean[0].wide());
    for chunk in [1, 7, N] {
        let session = problem.session(&objective, With::default());
        compare(&problem.found(session, Chunks::Tokens(chunk)), &exact);
    }
}

#[test]
fn no_tokens() {
    let mut problem = Problem::new();
    problem.labels.fill(-100);
    let objective = Objective::default();
    let found = problem.found(problem.session(&objective, With::default()), Chunks::Tokens(7));
    assert_eq!(found.output.loss, 0.0);
    assert!(found.gradients.iter().flatten().all(|&g| g == 0.0));

    let problem = Problem::of([0, V], [H, TEACHER_H], 1);
    let found = problem.found(problem.session(&objective, With::default()), Chunks::default());
    assert_eq!(found.output.loss, 0.0);
    assert!(found.output.tokens.is_empty() && found.gradients.iter().flatten().all(|&g| g == 0.0));
}

#[test]
fn mistakes_are_explained() {
    let problem = Problem::new();
    let (student, teacher) = (problem.student.layer(), problem.teacher.layer());
    let objective = Objective::default();
    let fails = |result: atkd::Result<Output>, words: &[&str]| {
        let message = result.unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "{word:?} is not in {message:?}");
        }
    };
    let run = |student: &Layer, teacher: &Layer, chunks, gradients: Gradients| {
        let session = problem.session(&objective, With::default());
        head::loss(session, student, teacher, chunks, gradients)
    };
    fn none<'a>() -> Gradients<'a> {
        Gradients::default()
    }
    fails(run(&student, &teacher, Chunks::Tokens(0), none()), &["tokens of a chunk is 0"]);
    fails(run(&student, &teacher, Chunks::Memory(0), none()), &["memory of a chunk", "0"]);
    let few = vec![0.0_f32; 40 * TEACHER_H];
    let narrow = Layer::new(problem.teacher.hidden.elements(), &few, TEACHER_H).unwrap();
    fails(
        run(&student, &narrow, Chunks::default(), none()),
        &["the teacher's layer has 40 entries of the vocabulary", "50", "with_vocab"],
    );
    let short = Layer::new(&few[..3 * H], problem.student.weight.elements(), H).unwrap();
    fails(
        run(&short, &teacher, Chunks::default(), none()),
        &["the student's layer has 3 tokens", "60"],
    );
    let mut wrong = vec![0.0_f32; 7];
    let gradients = Gradients { weight: Some(&mut wrong), ..none() };
    fails(
        run(&student, &teacher, Chunks::default(), gradients),
        &["7 elements were given for the gradient of the weight", "800"],
    );
    let hidden = Some(ElementsMut::from(&mut wrong));
    let gradients = Gradients { hidden, ..none() };
    fails(run(&student, &teacher, Chunks::default(), gradients), &["hidden states", "960"]);
    let gradients = Gradients { bias: Some(&mut wrong), ..none() };
    fails(run(&student, &teacher, Chunks::default(), gradients), &["bias", "50"]);

    fn layer<'a>(hidden: &'a [f32], weight: &'a [f32], features: usize) -> atkd::Result<Layer<'a>> {
        Layer::new(hidden, weight, features)
    }
    assert_eq!(
        layer(&few[..7], &few, 5).unwrap_err(),
        Error::HiddenSize { what: "the hidden states", elements: 7, features: 5 }
    );
    let message = layer(&few[..5], &few[..6], 5).unwrap_err().to_string();
    assert!(message.contains("6 elements were given for the weight"), "{message}");
    assert!(layer(&[], &[], 5).is_err() && layer(&[], &few, 0).is_err());
    let layer = layer(&few[..5], &few[..10], 5).unwrap();
    assert!(layer.with_bias(&few[..3]).unwrap_err().to_string().contains("must be 2"));
    assert!(layer.with_vocab(3).is_err() && layer.with_vocab(0).is_err());
}
