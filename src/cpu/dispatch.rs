//! The instruction set of a call: chosen once, and held as proof that the machine has it.
//!
//! ```text
//! Instructions::accumulate     a method, for whoever holds an Instructions
//!   dispatch!                  one arm per instruction set
//!     avx512::accumulate       compile!: a function with the target features, which picks the loop's variant
//!       tile::accumulate       the loop, inlined there with its Vector
//! ```

use std::ffi::OsStr;
use std::sync::OnceLock;

use super::element::Element;
use super::exp::Exponent;
use super::math::{Fold, SecondSums, SecondSweep};
use super::tile::{
    self, Exponentials, Extent, Prefetch, Scales, Shift, Shifts, TileShifts, TileSums,
};
#[cfg(target_arch = "x86_64")]
use super::vector::{Avx2, Avx512};
use super::vector::{Portable, Vector};
use crate::{Error, Result};

/// The environment variable that names the instruction set to use, for machines that must agree to the bit.
const VARIABLE: &str = "ATKD_INSTRUCTIONS";

/// Compiles the loops of [`tile`] for one instruction set.
macro_rules! compile {
    ($module:ident, $vector:ty, $(#[$features:meta])*) => {
        mod $module {
            use super::*;
            type V = $vector;

            $(#[$features])*
            pub fn extent<L: Element>(x: &[L]) -> Extent {
                tile::extent::<L, V>(x)
            }

            $(#[$features])*
            pub fn sum_exp<L: Element>(
                x: &[L],
                shift: Shift,
                exponent: Exponent,
                prefetch: Prefetch,
            ) -> (f64, bool) {
                match shift.guarded {
                    false => tile::sum_exp::<L, V, false>(x, shift.value, exponent, prefetch),
                    true => tile::sum_exp::<L, V, true>(x, shift.value, exponent, prefetch),
                }
            }

            $(#[$features])*
            pub fn exponentials<L: Element>(
                x: &[L],
                shift: Shift,
                exponent: Exponent,
                out: &mut [f32],
                prefetch: Prefetch,
            ) -> bool {
                let value = shift.value;
                match shift.guarded {
                    false => tile::exponentials::<L, V, false>(x, value, exponent, out, prefetch),
                    true => tile::exponentials::<L, V, true>(x, value, exponent, out, prefetch),
                }
            }

            $(#[$features])*
            pub fn sum(x: &[f32]) -> f64 {
                tile::sum::<V>(x)
            }

            $(#[$features])*
            pub fn accumulate<L: Element, F: Fold>(
                logits: [&[L]; 2],
                shifts: &Shifts,
                exponent: Exponent,
                out: &mut Exponentials,
                prefetch: [Prefetch; 2],
            ) -> TileSums {
                let [a, b] = logits;
                let values = shifts.values();
                match (shifts.guarded::<F>(exponent), out.student_at_1.is_empty()) {
                    (false, true) => {
                        tile::accumulate::<L, V, F, false, false>(a, b, values, exponent, out, prefetch)
                    }
                    (false, false) => {
                        tile::accumulate::<L, V, F, false, true>(a, b, values, exponent, out, prefetch)
                    }
                    (true, true) => {
                        tile::accumulate::<L, V, F, true, false>(a, b, values, exponent, out, prefetch)
                    }
                    (true, false) => {
                        tile::accumulate::<L, V, F, true, true>(a, b, values, exponent, out, prefetch)
                    }
                }
            }

            $(#[$features])*
            pub fn sweep_again<L: Element, S: SecondSweep>(
                second: S,
                logits: [&[L]; 2],
                of_tile: &TileShifts,
                exponentials: &mut Exponentials,
            ) -> SecondSums<f64> {
                let [a, b] = logits;
                tile::sweep_again::<L, V, S>(second, a, b, of_tile, exponentials)
            }

            $(#[$features])*
            pub fn write_gradient<G: Element>(
                from: &Exponentials,
                scales: Scales,
                to: &mut [G],
                non_temporal: bool,
            ) {
                match non_temporal {
                    false => tile::write_gradient::<G, V, false>(from, scales, to),
                    true => tile::write_gradient::<G, V, true>(from, scales, to),
                }
            }
        }
    };
}

compile!(portable, Portable,);
#[cfg(target_arch = "x86_64")]
compile!(avx2, Avx2, #[target_feature(enable = "avx2,fma,f16c")]);
#[cfg(target_arch = "x86_64")]
compile!(avx512, Avx512, #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]);

/// An instruction set that this machine has: holding one is the proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instructions(Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Set {
    /// The architecture's baseline: SSE2, or NEON.
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

macro_rules! dispatch {
    ($self:ident, $function:ident $(::<$($generic:ident),*>)? ($($argument:expr),*)) => {
        match $self.0 {
            Set::Portable => portable::$function$(::<$($generic),*>)?($($argument),*),
            // SAFETY: `available` makes these only where the processor has the features.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { avx2::$function$(::<$($generic),*>)?($($argument),*) },
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { avx512::$function$(::<$($generic),*>)?($($argument),*) },
        }
    };
}

impl Instructions {
    /// All that this machine has, the widest last.
    pub fn available() -> Vec<Self> {
        #[allow(unused_mut, reason = "nothing is added on other architectures")]
        let mut sets = vec![Self(Set::Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
            {
                sets.push(Self(Set::Avx2));
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    sets.push(Self(Set::Avx512));
                }
            }
        }
        sets
    }

    /// The one that the environment variable `ATKD_INSTRUCTIONS` names, else the widest that this machine has.
    ///
    /// # Errors
    /// If the machine has none of that name.
    pub fn chosen() -> Result<Self> {
        static CHOSEN: OnceLock<Result<Instructions>> = OnceLock::new();
        CHOSEN.get_or_init(|| Self::named(std::env::var_os(VARIABLE).as_deref())).clone()
    }

    /// The one of this name; the widest for no name or an empty one.
    ///
    /// # Errors
    /// If the machine has none of that name.
    pub fn named(name: Option<&OsStr>) -> Result<Self> {
        let available = Self::available();
        let found = match name.filter(|name| !name.is_empty()) {
            Some(name) => available.iter().find(|set| name == set.key()),
            None => available.last(),
        };
        found.copied().ok_or_else(|| Error::Instructions {
            variable: VARIABLE,
            name: name.unwrap_or_default().to_string_lossy().into(),
            available: available.iter().map(|set| set.key()).collect::<Vec<_>>().join(", "),
        })
    }

    /// Its name in `ATKD_INSTRUCTIONS`.
    fn key(self) -> &'static str {
        match self.0 {
            Set::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512",
        }
    }

    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self.0 {
            Set::Portable if cfg!(target_arch = "x86_64") => "SSE2",
            Set::Portable if cfg!(target_arch = "aarch64") => "NEON",
            Set::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "AVX-512",
        }
    }

    /// Float32 numbers in a vector.
    pub fn lanes(self) -> usize {
        match self.0 {
            Set::Portable => Portable::LANES,
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => Avx2::LANES,
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => Avx512::LANES,
        }
    }

    /// See [`tile::extent`].
    pub fn extent<L: Element>(self, x: &[L]) -> Extent {
        dispatch!(self, extent(x))
    }

    /// See [`tile::sum_exp`].
    pub fn sum_exp<L: Element>(
        self,
        x: &[L],
        shift: Shift,
        exponent: Exponent,
        prefetch: Prefetch,
    ) -> (f64, bool) {
        dispatch!(self, sum_exp(x, shift, exponent, prefetch))
    }

    /// See [`tile::exponentials`].
    pub fn exponentials<L: Element>(
        self,
        x: &[L],
        shift: Shift,
        exponent: Exponent,
        out: &mut [f32],
        prefetch: Prefetch,
    ) -> bool {
        dispatch!(self, exponentials(x, shift, exponent, out, prefetch))
    }

    /// See [`tile::sum`].
    pub fn sum(self, x: &[f32]) -> f64 {
        dispatch!(self, sum(x))
    }

    /// See [`tile::accumulate`].
    pub fn accumulate<L: Element, F: Fold>(
        self,
        logits: [&[L]; 2],
        shifts: &Shifts,
        exponent: Exponent,
        out: &mut Exponentials,
        prefetch: [Prefetch; 2],
    ) -> TileSums {
        dispatch!(self, accumulate::<L, F>(logits, shifts, exponent, out, prefetch))
    }

    /// See [`tile::sweep_again`].
    pub fn sweep_again<L: Element, S: SecondSweep>(
        self,
        second: S,
        logits: [&[L]; 2],
        of_tile: &TileShifts,
        exponentials: &mut Exponentials,
    ) -> SecondSums<f64> {
        dispatch!(self, sweep_again::<L, S>(second, logits, of_tile, exponentials))
    }

    /// See [`tile::write_gradient`]. After non-temporal stores no other thread may be told of the gradient before a
    /// [`fence`](super::vector::fence).
    pub fn write_gradient<G: Element>(
        self,
        from: &Exponentials,
        scales: Scales,
        to: &mut [G],
        non_temporal: bool,
    ) {
        dispatch!(self, write_gradient::<G>(from, scales, to, non_temporal))
    }
}
