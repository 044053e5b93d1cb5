//! The types that logits and gradients have in memory. The arithmetic is float32 for all of them.

use half::{bf16, f16};

use super::vector::Vector;

/// A logit or an element of a gradient.
pub trait Element: Copy + Default {
    const NEG_INFINITY: Self;
    /// The first `V::LANES` of `from`, widened.
    fn load<V: Vector>(from: &[Self]) -> V;
    /// Writes the first `V::LANES` of `to`, rounded to nearest; see [`Vector::store`].
    fn store<V: Vector, const NON_TEMPORAL: bool>(value: V, to: &mut [Self]);
    fn widen(self) -> f32;
}

impl Element for f32 {
    const NEG_INFINITY: f32 = f32::NEG_INFINITY;
    #[inline(always)]
    fn load<V: Vector>(from: &[f32]) -> V {
        V::load(from)
    }
    #[inline(always)]
    fn store<V: Vector, const NON_TEMPORAL: bool>(value: V, to: &mut [f32]) {
        value.store::<NON_TEMPORAL>(to);
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Element for f16 {
    const NEG_INFINITY: f16 = f16::NEG_INFINITY;
    #[inline(always)]
    fn load<V: Vector>(from: &[f16]) -> V {
        V::load_f16(from)
    }
    #[inline(always)]
    fn store<V: Vector, const NON_TEMPORAL: bool>(value: V, to: &mut [f16]) {
        value.store_f16::<NON_TEMPORAL>(to);
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Element for bf16 {
    const NEG_INFINITY: bf16 = bf16::NEG_INFINITY;
    #[inline(always)]
    fn load<V: Vector>(from: &[bf16]) -> V {
        V::load_bf16(from)
    }
    #[inline(always)]
    fn store<V: Vector, const NON_TEMPORAL: bool>(value: V, to: &mut [bf16]) {
        value.store_bf16::<NON_TEMPORAL>(to);
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}
