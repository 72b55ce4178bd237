package fault

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Limits of a script.
const (
	maxRules = 10000            // a recorded run of hours fits
	maxFor   = 10 * time.Minute // of a pause or hold
	minEvery = 10 * time.Millisecond
	maxTime  = 24 * 7 * time.Hour
)

// Span is a range of times; a time is drawn from it each time it is used.
// 0 ≤ Min ≤ Max.
type Span struct{ Min, Max time.Duration }

// String is "3s" or "3s..6s".
func (s Span) String() string {
	if s.Min == s.Max {
		return s.Min.String()
	}
	return s.Min.String() + ".." + s.Max.String()
}

// Rule is one line of a script: once at a time, or again and again.
type Rule struct {
	Every  bool   // false: once, at When
	When   Span   // the time, or the gap between two times
	Do     Verb   // Kill, Pause or Hold
	Target string // a kind (one of its processes is drawn), a name, or "meta leader"
	For    Span   // of a pause or hold; 0 for a kill
}

// String is the rule as its line.
func (r Rule) String() string {
	s := "at "
	if r.Every {
		s = "every "
	}
	s += r.When.String() + " " + string(r.Do) + " " + r.Target
	if r.For.Max > 0 {
		s += " " + r.For.String()
	}
	return s
}

// Script is the rules of a run. Its text, in lines, "#" begins a comment:
//
//	every 3s..6s kill host          any host, 3 to 6 seconds after the last time
//	at 10s kill meta leader         whoever leads then
//	at 20s..25s pause host-2 800ms  this one, once
//	every 30s hold meta 5s..10s     kill it, and keep it down for a while
//	keep 2 host                     no fault that leaves fewer than 2 hosts up
//
// Keep counts what the script itself has put down, and a killed process for
// the second that its restart takes. A fault that names its process is never
// left out, so that a recorded run replays whole.
type Script struct {
	Rules []Rule
	Keep  map[string]int // by kind
}

// String is the script's text; Parse reads it back.
func (s Script) String() string {
	var b strings.Builder
	for _, kind := range kinds {
		if n, ok := s.Keep[kind]; ok {
			fmt.Fprintf(&b, "keep %d %s\n", n, kind)
		}
	}
	for _, r := range s.Rules {
		fmt.Fprintln(&b, r)
	}
	return b.String()
}

// Parse reads a script. Errors are Invalid and name the line.
func Parse(text string) (Script, error) {
	s := Script{Keep: map[string]int{}}
	n := 0
	for line := range strings.Lines(text) {
		n++
		line, _, _ = strings.Cut(line, "#")
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		if err := s.add(words); err != nil {
			return Script{}, fmt.Errorf("line %d, %q: %w", n, strings.Join(words, " "), err)
		}
	}
	return s, nil
}

func (s *Script) add(words []string) error {
	if len(s.Rules) == maxRules {
		return invalid("a script has at most %d rules", maxRules)
	}
	if words[0] == "keep" {
		return s.addKeep(words)
	}
	r, err := parseRule(words)
	if err != nil {
		return err
	}
	s.Rules = append(s.Rules, r)
	return nil
}

func (s *Script) addKeep(words []string) error {
	if len(words) != 3 || !slices.Contains(kinds, words[2]) {
		return invalid("write keep NUMBER host, or keep NUMBER meta")
	}
	n, err := strconv.Atoi(words[1])
	if err != nil || n < 0 {
		return invalid("%q is not a number of processes", words[1])
	}
	s.Keep[words[2]] = n
	return nil
}

func parseRule(words []string) (Rule, error) {
	if len(words) < 4 || (words[0] != "at" && words[0] != "every") {
		return Rule{}, invalid("write at|every TIME kill|pause|hold TARGET [TIME], or keep NUMBER KIND")
	}
	r := Rule{Every: words[0] == "every", Do: Verb(words[2]), Target: words[3]}
	var err error
	if r.When, err = parseSpan(words[1]); err != nil {
		return Rule{}, err
	}
	if r.When.Max > maxTime || (r.Every && r.When.Min < minEvery) {
		return Rule{}, invalid("the time %v is out of range: at most %v, and every at least %v", r.When, maxTime, minEvery)
	}
	rest := words[4:]
	if r.Target == KindMeta && len(rest) > 0 && rest[0] == "leader" {
		r.Target, rest = leader, rest[1:]
	}
	return r, r.parseFor(rest)
}

// parseFor reads what stands after the target.
func (r *Rule) parseFor(rest []string) error {
	switch r.Do {
	case Kill:
		if len(rest) > 0 {
			return invalid("%q after a kill means nothing: a kill has no length", strings.Join(rest, " "))
		}
		return nil
	case Pause, Hold:
		if len(rest) != 1 {
			return invalid("say for how long to %s it, and nothing after that", r.Do)
		}
		var err error
		if r.For, err = parseSpan(rest[0]); err != nil {
			return err
		}
		if r.For.Min <= 0 || r.For.Max > maxFor {
			return invalid("a %s of %v is out of range: above 0 and at most %v", r.Do, r.For, maxFor)
		}
		return nil
	}
	return invalid("%q is no fault: use kill, pause or hold", r.Do)
}

// parseSpan reads "3s" or "3s..6s".
func parseSpan(text string) (Span, error) {
	from, to, two := strings.Cut(text, "..")
	if !two {
		to = from
	}
	lo, err := time.ParseDuration(from)
	if err != nil {
		return Span{}, invalid("%q is no time: write 800ms, 3s or 3s..6s", text)
	}
	hi, err := time.ParseDuration(to)
	if err != nil {
		return Span{}, invalid("%q is no time: write 800ms, 3s or 3s..6s", text)
	}
	if lo < 0 || hi < lo {
		return Span{}, invalid("%q is no range of times: the first must not be below 0 nor above the second", text)
	}
	return Span{lo, hi}, nil
}
