//! A small transformer language model: pre-norm, causal, with tied embeddings.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::ops::{rms_norm_slow, softmax};

#[derive(Clone, Copy)]
pub struct Size {
    pub layers: usize,
    pub heads: usize,
    pub width: usize,
}

pub struct Model {
    size: Size,
    tokens: Var,
    positions: Var,
    layers: Vec<Layer>,
    norm: Var,
    /// 0 where a token may look and -inf where it may not, `[time, time]`.
    mask: Tensor,
}

struct Layer {
    attention_norm: Var,
    qkv: Var,
    attention_out: Var,
    mlp_norm: Var,
    up: Var,
    down: Var,
}

impl Model {
    /// Weights drawn from the seed.
    pub fn new(size: Size, vocab: usize, time: usize, seed: u64) -> Result<Self> {
        let mut rng = fastrand::Rng::with_seed(seed);
        let width = size.width;
        let mut normal = |rows, columns, deviation| normal(&mut rng, rows, columns, deviation);
        let scale = |inputs: usize| (inputs as f64).powf(-0.5);
        let residual = (2.0 * size.layers as f64).powf(-0.5);
        let mut layers = Vec::new();
        for _ in 0..size.layers {
            layers.push(Layer {
                attention_norm: ones(width)?,
                qkv: normal(width, 3 * width, scale(width))?,
                attention_out: normal(width, width, residual * scale(width))?,
                mlp_norm: ones(width)?,
                up: normal(width, 4 * width, scale(width))?,
                down: normal(4 * width, width, residual * scale(4 * width))?,
            });
        }
        let mask: Vec<f32> = (0..time * time)
            .map(|i| if i % time > i / time { f32::NEG_INFINITY } else { 0.0 })
            .collect();
        Ok(Self {
            size,
            tokens: normal(vocab, width, 0.02)?,
            positions: normal(time, width, 0.02)?,
            layers,
            norm: ones(width)?,
            mask: Tensor::from_vec(mask, (time, time), &Device::Cpu)?,
        })
    }

    pub fn vars(&self) -> Vec<Var> {
        let mut vars = vec![&self.tokens, &self.positions, &self.norm];
        for layer in &self.layers {
            vars.extend([&layer.attention_norm, &layer.qkv, &layer.attention_out]);
            vars.extend([&layer.mlp_norm, &layer.up, &layer.down]);
        }
        vars.into_iter().cloned().collect()
    }

    pub fn parameters(&self) -> usize {
        self.vars().iter().map(|var| var.elem_count()).sum()
    }

    /// Logits `[batch * time, vocab]` of what follows each token of `[batch, time]`.
    pub fn logits(&self, tokens: &Tensor) -> Result<Tensor> {
        self.hidden(tokens)?.matmul(&self.tokens.t()?)
    }

    /// Logits `[batch, vocab]` of what follows the last token of each sequence of `[batch, time]`.
    pub fn last_logits(&self, tokens: &Tensor) -> Result<Tensor> {
        let (batch, time) = tokens.dims2()?;
        let hidden = self.hidden(tokens)?.reshape((batch, time, self.size.width))?;
        let last = hidden.narrow(1, time - 1, 1)?.squeeze(1)?.contiguous()?;
        last.matmul(&self.tokens.t()?)
    }

    /// The weight `[vocab, width]` by whose transpose logits are hidden states multiplied.
    pub fn output_weight(&self) -> &Tensor {
        &self.tokens
    }

    /// Hidden states `[batch * time, width]` of the tokens of `[batch, time]`, which the last layer multiplies.
    pub fn hidden(&self, tokens: &Tensor) -> Result<Tensor> {
        let (batch, time) = tokens.dims2()?;
        let rows = self.tokens.index_select(&tokens.flatten_all()?, 0)?;
        let rows = rows.reshape((batch, time, self.size.width))?;
        let positions = self.positions.narrow(0, 0, time)?;
        let mut x = rows.broadcast_add(&positions)?.reshape((batch * time, ()))?;
        for layer in &self.layers {
            x = (&x + self.attention(layer, &norm(&x, &layer.attention_norm)?, batch, time)?)?;
            let hidden = norm(&x, &layer.mlp_norm)?.matmul(&layer.up)?.relu()?.sqr()?;
            x = (&x + hidden.matmul(&layer.down)?)?;
        }
        norm(&x, &self.norm)
    }

    fn attention(&self, layer: &Layer, x: &Tensor, batch: usize, time: usize) -> Result<Tensor> {
        let Size { heads, width, .. } = self.size;
        let head = width / heads;
        let qkv = x.matmul(&layer.qkv)?.reshape((batch, time, 3, heads, head))?;
        let part = |i| qkv.narrow(2, i, 1)?.squeeze(2)?.transpose(1, 2)?.contiguous();
        let (q, k, v): (Tensor, Tensor, Tensor) = (part(0)?, part(1)?, part(2)?);
        let scores = (q.matmul(&k.t()?)? * (head as f64).powf(-0.5))?;
        let mask = self.mask.narrow(0, 0, time)?.narrow(1, 0, time)?;
        let weights = softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
        let mixed = weights.matmul(&v)?.transpose(1, 2)?.reshape((batch * time, width))?;
        mixed.matmul(&layer.attention_out)
    }
}

fn norm(x: &Tensor, weight: &Var) -> Result<Tensor> {
    rms_norm_slow(x, weight, 1e-5)
}

fn ones(width: usize) -> Result<Var> {
    Var::ones(width, DType::F32, &Device::Cpu)
}

/// Independent normal numbers, by Box and Muller.
fn normal(rng: &mut fastrand::Rng, rows: usize, columns: usize, deviation: f64) -> Result<Var> {
    let values: Vec<f32> = (0..rows * columns)
        .map(|_| {
            let radius = (-2.0 * (1.0 - rng.f64()).ln()).sqrt();
            (deviation * radius * (std::f64::consts::TAU * rng.f64()).cos()) as f32
        })
        .collect();
    Var::from_vec(values, (rows, columns), &Device::Cpu)
}
