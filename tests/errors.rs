//! An error says what is wrong with a call, with the numbers that explain it, and nothing was written.

use atkd::{
    Batch, Coefficients, Dtype, Error, Labels, Logits, LogitsMut, Objective, Reduction, cpu,
    reference,
};
use half::{bf16, f16};

#[track_caller]
fn says<T>(result: Result<T, Error>, words: &[&str]) {
    let message = match result {
        Ok(_) => panic!("no error"),
        Err(error) => error.to_string(),
    };
    for word in words {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
}

#[test]
fn settings_outside_their_domain() {
    let o = Objective::default();
    says(Objective::atkd(7.0), &["lambda", "7", "[0, 1]"]);
    says(Objective::atkd(f64::NAN), &["lambda", "NaN"]);
    says(o.with_hard_ratio(-0.1), &["hard ratio", "-0.1", "[0, 1]"]);
    says(o.with_temperature(0.0), &["temperature", "0", "above 0"]);
    says(o.with_temperature(f64::INFINITY), &["temperature", "inf", "finite"]);
    // Their reciprocals, and what multiplies them, are neither in float32.
    for temperature in [1e-300, 1e-40, 1e-39, 1e-38, 9e-31, 2e30, 1e38, 1e300, 1e308, f64::NAN] {
        says(
            o.with_temperature(temperature),
            &["temperature", &format!("{temperature:e}"), "1e-30"],
        );
    }
    says(o.with_kd_weight(-1.0), &["distillation weight", "-1"]);
    says(o.with_ce_weight(f64::NAN), &["cross-entropy weight", "NaN"]);
    says(o.with_upstream_gradient(f64::INFINITY), &["upstream gradient", "inf"]);
    says(o.with_reduction(Reduction::Denominator(0.0)), &["denominator", "0"]);
}

/// An objective that treats all tokens alike has no groups.
#[test]
fn means_of_groups_that_are_not_there() {
    let says_of = |objective: Objective, words: &[&str]| {
        says(objective.with_reduction(Reduction::GroupMean), words);
    };
    says_of(Objective::plain(), &["mean for each group", "TKD 1 and DKD UNC", "such as atkd"]);
    says_of(Objective::tkd(), &["TKD 1 and DKD 0"]);
    says_of(Objective::dkd(), &["TKD 0 and DKD 1"]);
    let same = Coefficients::new(0.25, 0.5);
    says_of(Objective::decoupled(same, same).unwrap(), &["TKD 0.25 and DKD 0.5"]);
    assert!(Objective::atkd(0.5).unwrap().with_reduction(Reduction::GroupMean).is_ok());
}

#[test]
fn shapes_that_do_not_fit() {
    let logits = [0.0_f32; 12];
    says(Logits::new(&logits[..], 3, 5), &["15", "3 tokens of 5", "12"]);
    says(Logits::new(&logits[..], 3, 0), &["vocabulary 0", "at least one"]);
    says(Logits::strided(&logits[..], 3, 4, 3), &["row stride 3", "at least the vocabulary"]);
    says(Logits::strided(&logits[..], 3, 2, 6), &["14", "row stride 6", "12"]);
    says(Logits::strided(&logits[..], usize::MAX, 4, 4), &["address space"]);

    let teacher = Logits::new(&logits[..], 3, 4).unwrap();
    says(Batch::new(teacher, &[1_i64, 2]), &["2 labels", "3 tokens"]);
    let batch = Batch::new(teacher, &[0_i64, 1, 2]).unwrap();
    let student = Logits::new(&logits[..], 4, 3).unwrap();
    says(cpu::forward(&Objective::default(), &batch, student), &["[4, 3]", "[3, 4]", "student"]);
    says(reference::forward(&Objective::default(), &batch, student), &["[4, 3]", "[3, 4]"]);
    let mut gradient = [9.0_f32; 8];
    let view = LogitsMut::new(&mut gradient[..], 2, 4).unwrap();
    let error = cpu::forward_backward(&Objective::default(), &batch, teacher, view);
    says(error, &["gradient", "[2, 4]", "[3, 4]"]);
    let student = [f16::ONE; 12];
    let student = Logits::new(&student[..], 3, 4).unwrap();
    let mut gradient = [bf16::ONE; 12];
    let view = LogitsMut::new(&mut gradient[..], 3, 4).unwrap();
    let error = cpu::forward_backward(&Objective::default(), &batch, student, view);
    says(error, &["BF16", "F16 student logits", "F16 or F32"]);
    assert!(gradient.iter().all(|&g| g == bf16::ONE));
}

#[test]
fn labels_outside_the_vocabulary() {
    let logits = [0.5_f32; 12];
    let teacher = Logits::new(&logits[..], 3, 4).unwrap();
    for label in [4, -1, i64::MIN, i64::MAX] {
        let labels = [0, label, 2];
        let batch = Batch::new(teacher, &labels).unwrap();
        let words = ["token 1", &label.to_string(), "vocabulary size 4", "-100"];
        says(cpu::forward(&Objective::default(), &batch, teacher), &words);
        says(reference::forward(&Objective::default(), &batch, teacher), &words);
        let mut logits = logits;
        let view = LogitsMut::new(&mut logits[..], 3, 4).unwrap();
        says(cpu::forward_backward_in_place(&Objective::default(), &batch, view), &words);
        assert_eq!(logits, [0.5; 12], "an error must leave the logits as they were");
    }
    let batch = Batch::new(teacher, Labels::I32(&[0, 9, 2])).unwrap();
    says(cpu::forward(&Objective::default(), &batch, teacher), &["token 1", "9"]);
    let batch = Batch::unlabelled(teacher);
    says(cpu::forward(&Objective::default(), &batch, teacher), &["no labels", "Target::Teacher"]);
}

#[test]
fn sequences_that_do_not_partition_the_tokens() {
    let logits = [0.0_f32; 12];
    let batch = Batch::unlabelled(Logits::new(&logits[..], 3, 4).unwrap());
    says(batch.with_sequences(&[]), &["at least one"]);
    says(batch.with_sequences(&[1, 3]), &["must be 0"]);
    says(batch.with_sequences(&[0, 2, 1, 3]), &["offset 2 is 1", "fall"]);
    says(batch.with_sequences(&[0, 2]), &["is 2", "3 tokens"]);
}

/// A message is a sentence of English, whatever it is about and however many there are.
#[test]
fn messages_are_sentences() {
    let is = |error: Error, message: &str| assert_eq!(error.to_string(), message);
    for what in ["the gradient", "the teacher's logits"] {
        is(
            Error::Null { what, elements: 15 },
            &format!("the address of {what} is null, but 15 elements were announced"),
        );
        is(
            Error::Null { what, elements: 1 },
            &format!("the address of {what} is null, but 1 element was announced"),
        );
        is(
            Error::Unaligned { what, address: 6, multiple: 4 },
            &format!("the address of {what} is 0x6, which is no multiple of an element's 4 bytes"),
        );
        is(
            Error::ShapeMismatch { what, expected: [3, 4], actual: [4, 3] },
            &format!("the shape of {what} is [4, 3], but that of the teacher's logits is [3, 4]"),
        );
        let reason = "the vocabulary must hold at least one token";
        is(
            Error::Shape { what, tokens: 1, vocab: 0, strides: 0.into(), reason },
            &format!(
                "the shape of {what} is impossible: 1 token, vocabulary 0, row stride 0; {reason}"
            ),
        );
        is(
            Error::Length {
                what,
                expected: 14,
                tokens: 3,
                vocab: 2,
                strides: 6.into(),
                actual: 12,
            },
            &format!(
                "3 tokens of 2 logits with row stride 6 take 14 elements, but the slice of {what} holds 12"
            ),
        );
        is(
            Error::OtherContext { what, expected: 0, actual: 1 },
            &format!(
                "the context of {what} (device 1) is another than that of the kernels (device 0)"
            ),
        );
    }
    let dtype = |student, actual| Error::GradientDtype { student, actual };
    is(
        dtype(Dtype::Bf16, Dtype::F16),
        "the gradient is F16, but for BF16 student logits it must be BF16 or F32",
    );
    is(Error::LabelCount { labels: 1, tokens: 3 }, "1 label was given for 3 tokens");
    is(Error::LabelCount { labels: 3, tokens: 1 }, "3 labels were given for 1 token");
    is(Error::MarginCount { margins: 0, tokens: 1 }, "0 margins were given for 1 token");
}
