package fault

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"sort"
	"time"
)

// killOut is how long a killed process counts as down for Keep: until its
// supervisor has restarted it and it serves again.
const killOut = time.Second

// Scheduler turns a script into actions. It is pure: the script, the seed and
// the names decide every action; how often Next is called does not.
type Scheduler struct {
	rules []pending
	keep  map[string]int
	names map[string][]string // by kind, sorted
	out   []outage            // of faults not over yet
	ends  []Action            // releases to come, by time
	fired int                 // actions so far; gives ids
}

// outage is one process that a fault has put down until a time.
type outage struct {
	kind, name string // the name is "meta leader" when nobody knows yet who it is
	until      time.Duration
}

// pending is a rule with the time it is due next.
type pending struct {
	Rule
	rng  *rand.Rand // its own, so that rules do not disturb each other's draws
	due  time.Duration
	done bool
}

// NewScheduler checks the script against the cluster's processes (names, by
// kind). Errors are Invalid.
func NewScheduler(script Script, seed uint64, names map[string][]string) (*Scheduler, error) {
	s := &Scheduler{keep: script.Keep, names: map[string][]string{}}
	for _, kind := range kinds {
		s.names[kind] = slices.Sorted(slices.Values(names[kind]))
	}
	for i, r := range script.Rules {
		if len(s.candidates(r.Target)) == 0 {
			return nil, invalid("the rule %q is about nobody: the cluster has no %s", r, r.Target)
		}
		p := pending{Rule: r, rng: rand.New(rand.NewPCG(seed, uint64(i)))}
		p.due = p.draw(r.When)
		s.rules = append(s.rules, p)
	}
	return s, nil
}

// draw takes a time of the span, in whole milliseconds if it has any choice.
func (p *pending) draw(s Span) time.Duration {
	if s.Min == s.Max {
		return s.Min
	}
	ms := (s.Max - s.Min) / time.Millisecond
	return min(s.Max, s.Min+time.Duration(p.rng.Int64N(int64(ms)+1))*time.Millisecond)
}

// candidates are the processes a target can mean, sorted.
func (s *Scheduler) candidates(target string) []string {
	if target == leader {
		return s.names[KindMeta]
	}
	if list, ok := s.names[target]; ok {
		return list
	}
	if s.kindOf(target) != "" {
		return []string{target}
	}
	return nil
}

func (s *Scheduler) kindOf(name string) string {
	if name == leader {
		return KindMeta
	}
	for _, kind := range kinds {
		if slices.Contains(s.names[kind], name) {
			return kind
		}
	}
	return ""
}

// Due returns when the next action may come; false when none ever will.
func (s *Scheduler) Due() (time.Duration, bool) {
	p := s.first()
	switch {
	case p == nil && len(s.ends) == 0:
		return 0, false
	case p == nil:
		return s.ends[0].At, true
	case len(s.ends) == 0:
		return p.due, true
	}
	return min(p.due, s.ends[0].At), true
}

// first is the rule that is due first; the earlier line wins a tie.
func (s *Scheduler) first() *pending {
	var best *pending
	for i := range s.rules {
		if p := &s.rules[i]; !p.done && (best == nil || p.due < best.due) {
			best = p
		}
	}
	return best
}

// Next returns the actions due up to now, in order. A rule that finds nobody
// it may break (Keep) gives none.
func (s *Scheduler) Next(now time.Duration) []Action {
	var out []Action
	for {
		due, any := s.Due()
		if !any || due > now {
			return out
		}
		if len(s.ends) > 0 && s.ends[0].At == due { // ends first: they free a place
			out = append(out, s.ends[0])
			s.ends = s.ends[1:]
			continue
		}
		if a, ok := s.fire(s.first()); ok {
			out = append(out, a)
		}
	}
}

// fire makes a due rule's action and sets its next time.
func (s *Scheduler) fire(p *pending) (Action, bool) {
	a := Action{At: p.due, Do: p.Do, For: p.draw(p.For)}
	pick := p.rng.Uint64() // drawn always: a skipped fault must not shift the later ones
	if p.Every {
		p.due += p.draw(p.When)
	} else {
		p.done = true
	}
	a.Target = s.target(p.Target, a.At, pick)
	if a.Target == "" {
		return a, false
	}
	s.fired++
	a.id = s.fired
	s.out = append(s.out, outage{s.kindOf(a.Target), a.Target, a.At + max(a.For, killOut)})
	if a.Do == Hold {
		end := Action{At: a.At + a.For, Do: release, Target: a.Target, id: a.id}
		i := sort.Search(len(s.ends), func(i int) bool { return s.ends[i].At > end.At })
		s.ends = slices.Insert(s.ends, i, end)
	}
	return a, true
}

// target returns whom a rule hits: the one it names, or one drawn of those
// that are up; "" when Keep forbids it or nobody is up.
func (s *Scheduler) target(target string, at time.Duration, pick uint64) string {
	list, isKind := s.names[target]
	if target != leader && !isKind {
		return target
	}
	s.out = slices.DeleteFunc(s.out, func(o outage) bool { return o.until <= at })
	kind, down := cmp.Or(s.kindOf(target), target), 0
	for _, o := range s.out {
		if o.kind == kind {
			down++
		}
	}
	if keep, ok := s.keep[kind]; ok && len(s.names[kind])-down-1 < keep {
		return ""
	}
	if target == leader {
		return leader
	}
	up := slices.DeleteFunc(slices.Clone(list), func(name string) bool {
		return slices.ContainsFunc(s.out, func(o outage) bool { return o.name == name })
	})
	if len(up) == 0 {
		return ""
	}
	return up[pick%uint64(len(up))]
}
