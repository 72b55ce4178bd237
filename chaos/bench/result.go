package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
)

// stallTargetMs is the longest write a server's death may cost.
const stallTargetMs = 500

// Result is what `cairn bench -o json` prints; names and units are stable.
type Result struct {
	SizeBytes uint64      `json:"sizeBytes"`
	Rounds    int         `json:"rounds"`
	RunS      float64     `json:"runSeconds"`
	Reference string      `json:"reference"`
	Jobs      []JobResult `json:"jobs"`
	Kill      KillResult  `json:"kill"`
}

// JobResult compares both sides in one job.
type JobResult struct {
	Name      string  `json:"name"`
	Cairn     Figures `json:"cairn"`
	Reference Figures `json:"reference"`
	Ratio     float64 `json:"ratio"`            // median of the rounds' ratios of IOPerS
	Target    float64 `json:"target,omitempty"` // the smallest good ratio; none when absent
	Met       bool    `json:"met"`              // true when there is no target
}

// Figures are medians over the rounds.
type Figures struct {
	IOPerS      float64 `json:"ioPerSecond"`
	IOPerSMin   float64 `json:"ioPerSecondMin"`
	IOPerSMax   float64 `json:"ioPerSecondMax"`
	P99Us       float64 `json:"p99Us"`
	ServerCPUUs float64 `json:"serverCpuUsPerIO"` // all server processes
	ClientCPUUs float64 `json:"clientCpuUsPerIO"` // fio's own
}

// KillResult is the cost of a chunk server's kill -9 to a writer.
type KillResult struct {
	LongestWriteMs float64   `json:"longestWriteMs"` // median over the kills
	EachMs         []float64 `json:"eachMs"`
	WithoutAKillMs float64   `json:"withoutAKillMs"` // median of the longest write of runs without one
	TargetBelowMs  float64   `json:"targetBelowMs"`
	Met            bool      `json:"met"` // every kill stayed below the target
}

func (b *bench) result() *Result {
	r := &Result{SizeBytes: b.cfg.SizeBytes, Rounds: b.cfg.Rounds, RunS: b.cfg.Each.Seconds(), Reference: "qemu-nbd on one raw file"}
	for _, j := range jobs {
		r.Jobs = append(r.Jobs, compare(j, b.samples[j.name][sideCairn], b.samples[j.name][sideReference]))
	}
	k := KillResult{LongestWriteMs: median(b.stalls) / 1000, WithoutAKillMs: median(b.calm) / 1000, TargetBelowMs: stallTargetMs, Met: true}
	for _, us := range b.stalls {
		k.EachMs = append(k.EachMs, us/1000)
		k.Met = k.Met && us/1000 < stallTargetMs
	}
	r.Kill = k
	return r
}

// compare pairs the rounds: both runs of a round saw the machine in about the
// same state, so the median of ratios says more than the ratio of medians.
func compare(j job, cairn, reference []sample) JobResult {
	var ratios []float64
	for i := range cairn {
		ratios = append(ratios, cairn[i].IOPerS/reference[i].IOPerS)
	}
	ratio := median(ratios)
	return JobResult{Name: "4k " + j.name, Cairn: figures(cairn), Reference: figures(reference),
		Ratio: ratio, Target: j.target, Met: ratio >= j.target}
}

func figures(ss []sample) Figures {
	pick := func(f func(sample) float64) []float64 {
		var out []float64
		for _, s := range ss {
			out = append(out, f(s))
		}
		return out
	}
	io := pick(func(s sample) float64 { return s.IOPerS })
	return Figures{
		IOPerS: median(io), IOPerSMin: slices.Min(io), IOPerSMax: slices.Max(io),
		P99Us:       median(pick(func(s sample) float64 { return s.P99Us })),
		ServerCPUUs: median(pick(func(s sample) float64 { return s.ServerCPUUs })),
		ClientCPUUs: median(pick(func(s sample) float64 { return s.ClientCPUUs })),
	}
}

// median of an even count is the mean of the two in the middle; of none, zero.
func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// nameWidth keeps the jobs' names to the left in a table of figures that stand
// to the right.
const nameWidth = 25

func (r *Result) print(out io.Writer, asJSON bool) error {
	if asJSON {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		return enc.Encode(r)
	}
	if _, err := fmt.Fprintf(out, "cairn with 3 replicas against %s, same machine and file system, %d MiB, medians of %d rounds of %g s\n\n",
		r.Reference, r.SizeBytes>>20, r.Rounds, r.RunS); err != nil {
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "%-*s\tcairn\t\t\t\tqemu-nbd\t\t\t\t\t\t\t\n", nameWidth, "")
	fmt.Fprintf(w, "%-*s\tIO/s\tp99 µs\tCPU µs\tfio µs\tIO/s\tp99 µs\tCPU µs\tfio µs\tratio\ttarget\t\t\n", nameWidth, "over NBD")
	for _, j := range r.Jobs {
		target, verdict := "", ""
		if j.Target > 0 {
			target, verdict = fmt.Sprintf("≥ %g", j.Target), met(j.Met)
		}
		fmt.Fprintf(w, "%-*s\t%s\t%s\t%.2f\t%s\t%s\t\n", nameWidth, j.Name, j.Cairn, j.Reference, j.Ratio, target, verdict)
	}
	if err := w.Flush(); err != nil { // holds back every error of the lines above
		return err
	}
	_, err := fmt.Fprintf(out, "\nkill -9 of a chunk server, 4k random write at depth 4: longest write %.0f ms (each: %s), %.0f ms without a kill; target < %d ms: %s\n"+
		"CPU µs: per I/O, over all server processes of a side; fio µs: the client's own, per I/O.\n",
		r.Kill.LongestWriteMs, list(r.Kill.EachMs), r.Kill.WithoutAKillMs, stallTargetMs, met(r.Kill.Met))
	return err
}

// String is a side's part of a table row.
func (f Figures) String() string {
	return fmt.Sprintf("%.0f\t%.0f\t%.1f\t%.1f", f.IOPerS, f.P99Us, f.ServerCPUUs, f.ClientCPUUs)
}

func list(ms []float64) string {
	out := ""
	for i, v := range ms {
		if i > 0 {
			out += ", "
		}
		out += fmt.Sprintf("%.0f", v)
	}
	return out
}

func met(ok bool) string {
	if ok {
		return "met"
	}
	return "missed"
}
