package sim

import (
	"bufio"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// WriteReplay writes what Run needs to do a run again: the seed, the number of
// operations and each fault, one a line. Lines that begin with # are for people.
func WriteReplay(out io.Writer, r *Result) error {
	var b strings.Builder
	fmt.Fprintf(&b, "# %s\n", r.Shape)
	if f := r.Failure; f != nil {
		fmt.Fprintf(&b, "# %s at %s: %s\n", f.Promise, stamp(f.At), strings.ReplaceAll(f.Text, "\n", "\n# "))
	}
	fmt.Fprintf(&b, "seed %d\nsteps %d\n", r.Config.Seed, r.Config.Steps)
	for _, f := range r.Faults {
		fmt.Fprintln(&b, f)
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// ReadReplay reads what WriteReplay wrote.
func ReadReplay(in io.Reader) (Config, error) {
	cfg := Config{Faults: []Fault{}}
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		l := strings.TrimSpace(lines.Text())
		var err error
		switch {
		case l == "" || l[0] == '#':
		case strings.HasPrefix(l, "seed "):
			_, err = fmt.Sscanf(l, "seed %d", &cfg.Seed)
		case strings.HasPrefix(l, "steps "):
			_, err = fmt.Sscanf(l, "steps %d", &cfg.Steps)
		default:
			var f Fault
			f, err = ParseFault(l)
			cfg.Faults = append(cfg.Faults, f)
		}
		if err != nil {
			return cfg, fmt.Errorf("replay line %q: %w", l, err)
		}
	}
	if err := lines.Err(); err != nil {
		return cfg, fmt.Errorf("read the replay: %w", err)
	}
	if cfg.Seed == 0 || cfg.Steps <= 0 {
		return cfg, fmt.Errorf("this is no replay: a seed and a number of steps above 0 are needed")
	}
	return cfg, nil
}

// Minimize looks for a smaller run that breaks the same promise as r: fewer
// operations, fewer faults, shorter ones. It runs at most tries runs.
func Minimize(r *Result, tries int) *Result {
	m := &minimizer{best: r, tries: tries}
	m.best = r
	if r.Failure == nil {
		return r
	}
	m.cut()
	for n := max(len(m.best.Faults)/2, 1); ; n /= 2 {
		m.without(n)
		if n <= 1 || m.tries <= 0 {
			break
		}
	}
	m.cut()
	m.shorter()
	return m.best
}

type minimizer struct {
	best  *Result
	tries int
}

// try runs with other faults and steps and keeps the run if it fails alike.
func (m *minimizer) try(steps int, faults []Fault) bool {
	if m.tries <= 0 {
		return false
	}
	m.tries--
	cfg := m.best.Config
	cfg.Steps, cfg.Faults = steps, faults
	r := Run(cfg)
	if r.Failure == nil || r.Failure.Promise != m.best.Failure.Promise {
		return false
	}
	m.best = r
	return true
}

// cut ends the load where it failed, if it did so under load.
func (m *minimizer) cut() {
	if b := m.best.Stats.Begun; b < m.best.Config.Steps && b > 0 {
		keep := []Fault{}
		for _, f := range m.best.Faults {
			if f.At <= b {
				keep = append(keep, f)
			}
		}
		m.try(b, keep)
	}
}

// without leaves out n faults at a time.
func (m *minimizer) without(n int) {
	for at := 0; at < len(m.best.Faults); {
		f := m.best.Faults
		if !m.try(m.best.Config.Steps, slices.Concat(f[:at], f[min(at+n, len(f)):])) {
			at += n
		}
	}
}

// shorter halves how long each fault lasts.
func (m *minimizer) shorter() {
	for i := range m.best.Faults {
		for m.best.Faults[i].For > 10*time.Millisecond {
			f := slices.Clone(m.best.Faults)
			f[i].For /= 2
			if !m.try(m.best.Config.Steps, f) {
				break
			}
		}
	}
}
