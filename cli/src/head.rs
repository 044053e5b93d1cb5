//! The loss from hidden states and the weights of both models' last layers.

use std::path::Path;

use anyhow::{Context, Result, bail};
use atkd::cpu::Session;
use atkd::head::{self, Chunks, Gradients, Layer};
use atkd::{Objective, Output};
use safetensors::SafeTensors;

use crate::backend::{Backend, Choice};
use crate::destination::Destination;
use crate::loss::{self, OfTokens};
use crate::tensors::{self, Matrix, Tensor};

/// A file with this tensor holds hidden states in the place of logits.
pub const STUDENT_HIDDEN: &str = "student_hidden";

/// The backend for hidden states.
pub fn backend(choice: Choice) -> Result<Backend> {
    let name = match choice {
        Choice::Auto | Choice::Cpu => return Ok(Backend::Cpu),
        Choice::Cuda => "cuda",
        Choice::Simt => "simt",
        Choice::Reference => "reference",
    };
    bail!(
        "the {name} backend takes logits, but the file holds hidden states: use --backend cpu, or a file \
         with `student` and `teacher` for {name}"
    )
}

/// A model's last layer, and the hidden states that it multiplies.
struct Model<'a> {
    hidden: Matrix<'a>,
    weight: Matrix<'a>,
    bias: Option<Tensor<'a>>,
    names: [String; 3],
}

impl<'a> Model<'a> {
    fn read(path: &Path, file: &SafeTensors<'a>, model: &str) -> Result<Self> {
        let names = ["hidden", "weight", "bias"].map(|what| format!("{model}_{what}"));
        let hidden = Matrix::read(path, file, &names[0])?;
        let weight = Matrix::read(path, file, &names[1])?;
        let [size, expected] = [&weight, &hidden].map(|matrix| matrix.columns);
        if size != expected || weight.rows == 0 {
            bail!(
                "`{}` is [{}, {size}], but for `{}` [{}, {expected}] must be [V, {expected}]",
                names[1],
                weight.rows,
                names[0],
                hidden.rows
            );
        }
        let bias = Tensor::read_vector(file, &names[2])?;
        Ok(Self { hidden, weight, bias, names })
    }

    fn layer(&self, vocab: Option<usize>) -> Result<Layer<'_>> {
        let [hidden_name, weight_name, bias_name] = &self.names;
        let mut layer =
            Layer::new(self.hidden.elements(), self.weight.elements(), self.hidden.columns)
                .with_context(|| format!("`{hidden_name}`"))?;
        if let Some(bias) = &self.bias {
            layer = layer.with_bias(bias.elements()).with_context(|| format!("`{bias_name}`"))?;
        }
        match vocab {
            Some(vocab) => layer.with_vocab(vocab).with_context(|| format!("`{weight_name}`")),
            None => Ok(layer),
        }
    }
}

/// Computes the loss, and writes the gradients if there is a destination.
pub fn loss(
    path: &Path,
    file: &SafeTensors,
    objective: &Objective,
    of_tokens: &OfTokens,
    vocab_size: Option<usize>,
    chunks: Chunks,
    destination: Option<Destination>,
) -> Result<Output> {
    let student = Model::read(path, file, "student")?;
    let teacher = Model::read(path, file, "teacher")?;
    let (rows, of_teacher) = (student.weight.rows, teacher.weight.rows);
    let same_vocab = rows == of_teacher || vocab_size.is_some();
    if student.hidden.rows != teacher.hidden.rows || !same_vocab {
        bail!(
            "`student_hidden` is of {} tokens and `student_weight` of {rows} entries of the vocabulary, but \
             `teacher_hidden` of {} and `teacher_weight` of {of_teacher}: both must be of the same tokens and \
             one vocabulary{}",
            student.hidden.rows,
            teacher.hidden.rows,
            if same_vocab { "" } else { "; --vocab-size says where its padding starts" }
        );
    }
    let (layer, teacher) = (student.layer(vocab_size)?, teacher.layer(vocab_size)?);
    let (tokens, vocab) = (layer.tokens(), layer.vocab());
    let mut session = match &of_tokens.labels {
        Some(labels) if labels.len() != tokens => bail!(
            "`labels`: {} were given for {tokens} tokens, the rows of `student_hidden`",
            labels.len()
        ),
        Some(labels) => Session::begin(objective, labels, vocab)?,
        None => Session::begin_unlabelled(objective, tokens, vocab)?,
    };
    if let Some(weights) = &of_tokens.weights {
        session = session.with_token_weights(weights).context("`token_weights`")?;
    }
    if let Some(temperatures) = &of_tokens.temperatures {
        session = session.with_temperatures(temperatures).context("`temperatures`")?;
    }
    if let Some(log_probs) = tensors::of_tokens(file, "teacher_log_prob")? {
        session = session.with_teacher_log_probs(&log_probs).context("`teacher_log_prob`")?;
    }
    let Some(destination) = destination else {
        return Ok(head::loss(session, &layer, &teacher, chunks, Gradients::default())?);
    };
    let Matrix { columns, .. } = student.hidden;
    let mut hidden = Matrix::zeros(student.hidden.dtype(), tokens, columns)?;
    let mut weight = Matrix::zeros(atkd::Dtype::F32, rows, columns)?;
    let with_bias = student.bias.is_some();
    let mut bias = Matrix::zeros(atkd::Dtype::F32, if with_bias { rows } else { 0 }, 1)?;
    let gradients = Gradients {
        hidden: Some(hidden.elements_mut()),
        weight: weight.as_f32_mut(),
        bias: bias.as_f32_mut().filter(|_| with_bias),
    };
    let output = head::loss(session, &layer, &teacher, chunks, gradients)?;
    let mut tensors = vec![
        ("grad_hidden", hidden.safetensors_dtype(), vec![tokens, columns], hidden.bytes()),
        ("grad_weight", weight.safetensors_dtype(), vec![rows, columns], weight.bytes()),
    ];
    if with_bias {
        tensors.push(("grad_bias", bias.safetensors_dtype(), vec![rows], bias.bytes()));
    }
    loss::write(destination, tensors, &output)?;
    Ok(output)
}
