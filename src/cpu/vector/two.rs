//! Two vectors as one: long chains of dependent instructions, of which a processor's schedulers hold but one, go by twos.

use half::{bf16, f16};

use super::Vector;

#[derive(Clone, Copy)]
pub struct Two<V>(pub V, pub V);

impl<V: Vector> Vector for Two<V> {
    const LANES: usize = 2 * V::LANES;
    const STEPS: usize = V::STEPS;
    const COEFFICIENTS: &[f32] = V::COEFFICIENTS;
    const COEFFICIENTS_M1: &[f32] = V::COEFFICIENTS_M1;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self(V::splat(value), V::splat(value))
    }
    #[inline(always)]
    fn load(from: &[f32]) -> Self {
        Self(V::load(from), V::load(&from[V::LANES..]))
    }
    #[inline(always)]
    fn store<const NON_TEMPORAL: bool>(self, to: &mut [f32]) {
        self.0.store::<NON_TEMPORAL>(to);
        self.1.store::<NON_TEMPORAL>(&mut to[V::LANES..]);
    }
    #[inline(always)]
    fn load_bf16(from: &[bf16]) -> Self {
        Self(V::load_bf16(from), V::load_bf16(&from[V::LANES..]))
    }
    #[inline(always)]
    fn load_f16(from: &[f16]) -> Self {
        Self(V::load_f16(from), V::load_f16(&from[V::LANES..]))
    }
    #[inline(always)]
    fn store_bf16<const NON_TEMPORAL: bool>(self, to: &mut [bf16]) {
        self.0.store_bf16::<NON_TEMPORAL>(to);
        self.1.store_bf16::<NON_TEMPORAL>(&mut to[V::LANES..]);
    }
    #[inline(always)]
    fn store_f16<const NON_TEMPORAL: bool>(self, to: &mut [f16]) {
        self.0.store_f16::<NON_TEMPORAL>(to);
        self.1.store_f16::<NON_TEMPORAL>(&mut to[V::LANES..]);
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(self.0.add(other.0), self.1.add(other.1))
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(self.0.sub(other.0), self.1.sub(other.1))
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(self.0.mul(other.0), self.1.mul(other.1))
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self(self.0.div(other.0), self.1.div(other.1))
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        Self(self.0.mul_add(a.0, b.0), self.1.mul_add(a.1, b.1))
    }
    #[inline(always)]
    fn min_or(self, other: Self) -> Self {
        Self(self.0.min_or(other.0), self.1.min_or(other.1))
    }
    #[inline(always)]
    fn max_or(self, other: Self) -> Self {
        Self(self.0.max_or(other.0), self.1.max_or(other.1))
    }
    #[inline(always)]
    fn select_below(self, limit: f32, then: Self, otherwise: Self) -> Self {
        Self(
            self.0.select_below(limit, then.0, otherwise.0),
            self.1.select_below(limit, then.1, otherwise.1),
        )
    }
    #[inline(always)]
    fn step_power(self) -> Self {
        Self(self.0.step_power(), self.1.step_power())
    }
    #[inline(always)]
    fn split_octaves(self) -> (Self, Self) {
        let (first, second) = (self.0.split_octaves(), self.1.split_octaves());
        (Self(first.0, second.0), Self(first.1, second.1))
    }
    #[inline(always)]
    fn or_integer_bits(self, integers: Self) -> Self {
        Self(self.0.or_integer_bits(integers.0), self.1.or_integer_bits(integers.1))
    }
    #[inline(always)]
    fn prefetch(address: *const u8) {
        V::prefetch(address);
    }
}
