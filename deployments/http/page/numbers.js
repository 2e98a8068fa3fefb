// Numbers as people read them.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const clock = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });
const day = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "short" });

const sum = (values) => values.reduce((total, value) => total + value, 0);
const total = (entries) => sum(entries.map((one) => one.count));
const power = (exponent) => `10^${exponent.toFixed(1)}`;
const short = (value) => String(Number(value.toPrecision(3))).replace("-", "−");
const images = (count) => `${whole.format(count)} ${count === 1 ? "image" : "images"}`;

/** A share as per cent, with two digits where it is small. */
function percent(share) {
  if (!Number.isFinite(share)) return "–";
  const hundred = 100 * share;
  return `${hundred.toFixed(hundred === 0 || hundred >= 10 ? 0 : hundred >= 1 ? 1 : 2)}%`;
}

function seconds(value) {
  const [unit, factor] = value < 1e-3 ? ["µs", 1e6] : value < 1 ? ["ms", 1e3] : ["s", 1];
  return `${Number((value * factor).toPrecision(2))}\u00a0${unit}`;
}

/** The quantile `q` of a histogram, even within a bucket as Prometheus has it; beyond the last bound, that bound. */
function quantile({ bounds, counts }, q) {
  let rest = q * sum(counts);
  if (!rest) return null;
  for (let bin = 0; bin < bounds.length; bin++) {
    if (rest <= counts[bin]) {
      const low = bin ? bounds[bin - 1] : 0;
      return low + ((bounds[bin] - low) * rest) / counts[bin];
    }
    rest -= counts[bin];
  }
  return bounds.at(-1);
}
