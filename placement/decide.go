package placement

import (
	"cmp"
	"fmt"
	"math/bits"
	"slices"
	"sort"
	"strings"

	"github.com/cairnstore/cairn/proto/status"
)

// Score is a plugin that rates a host for a job, in [0, 1], larger is better.
type Score struct {
	Name string
	Rate func(Look) float64
}

// Look is what a score sees: a host with the job on it.
type Look struct {
	Shares [kinds]float64 // of each resource's limit in use, with the job; 0 where the host has none
	Has    [kinds]bool    // the host has the resource at all
	Gain   float64        // part of the job's traffic that the host would serve itself
	Empty  bool           // nothing is bound to the host yet
	Plenty bool           // enough hosts in use have much room
	Tight  bool           // few hosts have room for a large job any more
}

// fullest and leanest are the largest and the smallest share.
func (l *Look) fullest() (m float64) {
	for k := range kinds {
		m = max(m, l.Shares[k])
	}
	return m
}

func (l *Look) skew() float64 {
	lo, hi := 1.0, 0.0
	for k := range kinds {
		if l.Has[k] {
			lo, hi = min(lo, l.Shares[k]), max(hi, l.Shares[k])
		}
	}
	return max(0, hi-lo)
}

// The scores that come with cairn.
var (
	GainScore = Score{"gain", func(l Look) float64 { return l.Gain }}
	FitScore  = Score{"fit", func(l Look) float64 { return l.fullest() }}
	// HeadroomScore spreads, until few hosts have room for a large job: what is
	// left is then kept together for one. A fleet that is evenly 95 % full has
	// no host with an eighth free.
	HeadroomScore = Score{"headroom", func(l Look) float64 {
		if l.Tight {
			return l.fullest() * (1 - l.skew()*l.fullest())
		}
		return 1 - l.fullest()
	}}
	BalanceScore = Score{"balance", func(l Look) float64 { return 1 - l.skew() }}
	// EvenScore minds skew more the fuller the host: what is uneven at the end
	// stays so, and half-empty hosts have time to even out.
	EvenScore = Score{"even", func(l Look) float64 { return 1 - l.skew()*l.fullest() }}
	// RoomScore spreads VMs over the hosts that have their data, so that the
	// next one with data there finds room, and packs the others, so that large
	// ones do.
	RoomScore = Score{"room", func(l Look) float64 {
		if l.Gain > 0 {
			return 1 - l.fullest()
		}
		return l.fullest()
	}}
	// OpenScore wants rather a host in use than a new one, much rather while
	// there are plenty.
	OpenScore = Score{"open", func(l Look) float64 {
		switch {
		case !l.Empty:
			return 1
		case l.Plenty:
			return 0
		}
		return 0.98
	}}
)

// Weighted is a score and how much it counts.
type Weighted struct {
	Score
	Weight float64
}

// Policy is how hosts that fit a VM are ordered.
type Policy string

// The static policies. Local is the default.
const (
	NearData Policy = "local"    // most of its traffic local, then the tightest fit
	BestFit  Policy = "min"      // fewest hosts in use: keeps whole hosts free for large VMs
	WorstFit Policy = "max"      // most headroom left: keeps every host lightly loaded
	Balanced Policy = "balanced" // least skew between the shares of the resources in use
)

// Policies are all policies, the default first.
var Policies = []Policy{NearData, BestFit, WorstFit, Balanced}

// ParsePolicy reads a policy's name; "" is the default.
func ParsePolicy(name string) (Policy, error) {
	if name == "" {
		return NearData, nil
	}
	if p := Policy(name); slices.Contains(Policies, p) {
		return p, nil
	}
	return "", status.Errorf(status.Invalid, "there is no placement policy %q: use local, min, max or balanced", name)
}

// Weights returns a policy's scores.
//
// What fills hosts to the end is not the tightest fit but the evenest: a host
// whose memory is used up wastes its processors. So min and balanced open a new
// host rather than use one much more of one resource than of the other. Tightest
// fit alone needs 4.5 % more hosts than the bound, this below 2 %; the weights
// were chosen by replaying traces (docs/PLACEMENT.md).
func Weights(p Policy) []Weighted {
	switch p {
	case BestFit:
		return []Weighted{{EvenScore, 100}, {OpenScore, 10}, {FitScore, 1}, {GainScore, 0.001}}
	case WorstFit:
		return []Weighted{{HeadroomScore, 1}, {GainScore, 0.001}}
	case Balanced:
		return []Weighted{{EvenScore, 100}, {BalanceScore, 5}, {OpenScore, 10}, {FitScore, 0.5}, {GainScore, 0.001}}
	}
	return []Weighted{{GainScore, 10}, {RoomScore, 1}, {BalanceScore, 1}}
}

// SampleHosts is how many random hosts a sampled decision looks at beside
// those that hold the job's data, and how many of the fullest.
const SampleHosts = 100

// Scheduler decides where jobs of a fleet go. One goroutine owns it; several
// schedulers may share a fleet.
type Scheduler struct {
	Fleet   *Fleet
	Policy  Policy
	Weights []Weighted
	Sample  int // SampleHosts, or 0: look at every host
	Seed    uint64

	rng   uint64
	but   int   // 1 + a host that is not looked at; 0: none
	many  bool  // Look.Plenty of this decision
	tight bool  // Look.Tight
	holds []int // scratch
}

// NewScheduler returns a scheduler with a policy's scores.
func NewScheduler(f *Fleet, p Policy, sample int, seed uint64) *Scheduler {
	return &Scheduler{Fleet: f, Policy: p, Weights: Weights(p), Sample: sample, Seed: seed, rng: seed ^ 0x9e3779b97f4a7c15}
}

// weyl is splitmix64's step: it can be taken many times at once.
const weyl = 0x9e3779b97f4a7c15

// next is splitmix64.
func (s *Scheduler) next() uint64 {
	s.rng += weyl
	x := s.rng
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// Decision is an answer.
type Decision struct {
	Host  int // -1: none fits
	Score float64
	Gain  float64
}

// Decide returns the best host for a job among those it looks at. When no
// sampled host fits it looks at all: a refusal is never a matter of luck.
func (s *Scheduler) Decide(j *Job) Decision {
	best := Decision{Host: -1}
	packs := s.packs()
	s.many = packs && s.Fleet.plenty()
	s.tight = !packs && s.Fleet.tight()
	packs = packs || s.tight
	if s.Sample == 0 || s.Sample+len(j.Gains) >= s.Fleet.Len() {
		for i := range s.Fleet.hosts {
			s.try(j, i, &best)
		}
		return best
	}
	s.holds = s.holds[:0]
	for i := range j.Gains {
		s.holds = append(s.holds, i)
	}
	slices.Sort(s.holds)
	for _, i := range s.holds {
		s.try(j, i, &best)
	}
	if best.Host >= 0 && best.Score > s.withoutGain() {
		s.rng += uint64(s.Sample) * weyl // as if the rest had been looked at
		return best
	}
	if packs {
		s.holds = s.Fleet.open(j.Need, s.Sample, s.holds[:0])
		for _, i := range s.holds {
			s.try(j, i, &best)
		}
	}
	n := uint64(s.Fleet.Len())
	for range s.Sample {
		i, _ := bits.Mul64(s.next(), n)
		s.try(j, int(i), &best)
	}
	if best.Host < 0 {
		s.holds = s.Fleet.roomy(j.Need, s.holds[:0])
		for _, i := range s.holds {
			s.try(j, i, &best)
		}
	}
	return best
}

// DecideBut decides as if one host were not there.
func (s *Scheduler) DecideBut(j *Job, host int) Decision {
	s.but = host + 1
	defer func() { s.but = 0 }()
	return s.Decide(j)
}

// withoutGain is the most a host without any of a job's data can score: one with
// data that scores more needs no further look.
func (s *Scheduler) withoutGain() (sum float64) {
	for _, w := range s.Weights {
		if w.Name != GainScore.Name {
			sum += w.Weight
		}
	}
	return sum
}

// packs says whether the scores want full hosts.
func (s *Scheduler) packs() bool {
	return slices.ContainsFunc(s.Weights, func(w Weighted) bool { return w.Name == FitScore.Name || w.Name == RoomScore.Name })
}

// try rates one host and keeps it if it is better. Equal scores go to the
// lower number, so that the order of looking does not matter.
func (s *Scheduler) try(j *Job, i int, best *Decision) {
	h := s.Fleet.hosts[i]
	if i == s.but-1 || !h.passes(j) {
		return
	}
	if (j.Near != "" || j.Apart != "") && s.Fleet.apart(j, h) != "" {
		return
	}
	l := h.look(j, j.Gains[i])
	l.Plenty, l.Tight = s.many, s.tight
	sum := 0.0
	for w := range s.Weights {
		sum += s.Weights[w].Weight * s.Weights[w].Rate(l)
	}
	if best.Host < 0 || sum > best.Score || sum == best.Score && i < best.Host {
		*best = Decision{Host: i, Score: sum, Gain: l.Gain}
	}
}

func (f *Fleet) apart(j *Job, h *node) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.groupRefusal(j, h)
}

func (h *node) look(j *Job, gain float64) (l Look) {
	l.Gain, l.Empty = gain, true
	for k := range kinds {
		used := h.used[k].Load()
		l.Empty = l.Empty && used == 0
		if h.limit[k] > 0 {
			l.Has[k] = true
			l.Shares[k] = float64(used+j.Need[k]) / float64(h.limit[k])
		}
	}
	return l
}

// bindTries bounds how often one call decides anew after a conflict.
const bindTries = 16

// ErrNoHost is what Place returns when no host fits; None says why.
var ErrNoHost = status.Errorf(status.NoSpace, "no host fits: add hosts, stop a VM or ask for less")

// Place decides and binds, again after a conflict with another scheduler. It
// returns how many conflicts there were.
func (s *Scheduler) Place(j *Job) (d Decision, conflicts int, err error) {
	for conflicts < bindTries {
		if d = s.Decide(j); d.Host < 0 {
			return d, conflicts, ErrNoHost
		}
		if err = s.Fleet.Bind(j, d.Host); err != ErrConflict {
			return d, conflicts, err
		}
		conflicts++
	}
	return Decision{Host: -1}, conflicts, ErrConflict
}

// None counts why no host fits; it looks at every host.
func (s *Scheduler) None(j *Job) error {
	count := map[string]int{}
	for _, h := range s.Fleet.hosts {
		why := h.refuse(j)
		if why == "" {
			why = s.Fleet.apart(j, h)
		}
		if i := strings.Index(why, "has "); i == 0 && strings.HasSuffix(why, "free") {
			why = "too little " + why[strings.LastIndexByte(strings.TrimSuffix(why, " free"), ' ')+1:len(why)-len(" free")]
		}
		count[why]++
	}
	var whys []string
	for w, n := range count {
		whys = append(whys, fmt.Sprintf("%s: %s", plural(n, "host"), w))
	}
	sort.Strings(whys)
	return status.Errorf(status.NoSpace, "no host fits VM %s (%s); add hosts, stop a VM or ask for less", j.Name, list(whys))
}

// Reason is one sentence with the figures a decision went by.
func (s *Scheduler) Reason(j *Job, d Decision) string {
	h := s.Fleet.hosts[d.Host]
	used := h.load()
	left := func(k Kind) uint64 { return h.limit[k] - min(h.limit[k], used[k]) }
	if at, ok := s.Fleet.Where(j.Name); !ok || at != d.Host {
		used.add(j.Need)
	}
	local := "has none of its data"
	if g := j.Gains[d.Host]; g > 0 {
		local = fmt.Sprintf("would serve %.0f %% of its traffic itself", 100*g)
		if best := j.BestGain(); best > g {
			local += fmt.Sprintf(" (the best host, without room, %.0f %%)", 100*best)
		}
	}
	return fmt.Sprintf("%s %s; with it %s of %s CPU and %s of %s memory stay free", h.Name, local,
		amount(CPU, left(CPU)), amount(CPU, h.limit[CPU]), amount(Memory, left(Memory)), amount(Memory, h.limit[Memory]))
}

// BestGain is the largest of a job's gains.
func (j *Job) BestGain() (best float64) {
	for _, g := range j.Gains {
		best = max(best, g)
	}
	return best
}

// HostScore is how one host scores for a job.
type HostScore struct {
	Host    string
	Refused string    // why it does not fit; "": it does
	Values  []float64 // in the order of the scheduler's weights; 0 of one that does not fit
	Sum     float64   // Σ weight × value
}

// Scores returns every host's, the best first and those that do not fit last.
func (s *Scheduler) Scores(j *Job) (out []HostScore) {
	many := s.packs() && s.Fleet.plenty()
	tight := !s.packs() && s.Fleet.tight()
	for i, h := range s.Fleet.hosts {
		r := HostScore{Host: h.Name, Refused: h.refuse(j), Values: make([]float64, len(s.Weights))}
		if r.Refused == "" {
			r.Refused = s.Fleet.apart(j, h)
		}
		if r.Refused == "" {
			l := h.look(j, j.Gains[i])
			l.Plenty, l.Tight = many, tight
			for k, w := range s.Weights {
				r.Values[k] = w.Rate(l)
				r.Sum += w.Weight * r.Values[k]
			}
		}
		out = append(out, r)
	}
	slices.SortStableFunc(out, func(a, b HostScore) int { // else the fleet's order, as in Decide
		if (a.Refused == "") != (b.Refused == "") {
			return b2i(a.Refused != "") - b2i(b.Refused != "")
		}
		return cmp.Compare(b.Sum, a.Sum)
	})
	return out
}

// Explain is a table of all scores: whether a host passes, each score × its weight,
// and their sum; a person can add the columns up.
func (s *Scheduler) Explain(scores []HostScore) string {
	head := []string{"HOST"}
	for _, w := range s.Weights {
		head = append(head, fmt.Sprintf("%g × %s", w.Weight, strings.ToUpper(w.Name)))
	}
	out := [][]string{append(head, "SUM", "VERDICT")}
	for i, r := range scores {
		cells := []string{r.Host}
		cell := func(v float64) {
			if r.Refused != "" {
				cells = append(cells, "-")
				return
			}
			cells = append(cells, fmt.Sprintf("%.4f", v))
		}
		for _, v := range r.Values {
			cell(v)
		}
		cell(r.Sum)
		switch {
		case r.Refused != "":
			cells = append(cells, r.Refused)
		case i == 0:
			cells = append(cells, "best")
		default:
			cells = append(cells, "fits")
		}
		out = append(out, cells)
	}
	return Table(out)
}
