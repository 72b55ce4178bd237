package netplane

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Sight is what a host's probes say of one path to another host.
type Sight struct {
	From, To string // hosts
	Spine    string // the path's
	Alive    bool
	Routed   bool // From's routing has a session with the spine
}

// Cut is a link a host itself knows to be unusable.
type Cut struct {
	Host, Spine, Link, Why string
}

// Diagnose tells links, spines and hosts apart: one sentence for each cause,
// and none for what follows from another. A host no path leads to is told once,
// a spine nothing passes through once, and a link when it is the host's only
// dead path while the spine works for others.
func Diagnose(sights []Sight, cuts []Cut) (out []string) {
	hosts, spines := map[string]bool{}, map[string]bool{}
	cut := map[[2]string]bool{}
	for _, c := range cuts {
		cut[[2]string{c.Host, c.Spine}] = true
		out = append(out, fmt.Sprintf("link %s of host %s to %s is %s: its traffic takes other paths", c.Link, c.Host, c.Spine, c.Why))
	}
	for _, s := range sights {
		hosts[s.From], hosts[s.To], spines[s.Spine] = true, true, true
	}
	lost := map[string]bool{}
	for _, h := range slices.Sorted(maps.Keys(hosts)) {
		if seen, alive := count(sights, func(s Sight) bool { return s.To == h }); seen > 0 && alive == 0 {
			lost[h] = true
		}
	}
	if len(lost) == len(hosts) && len(hosts) > 0 { // nobody sees anybody: it is not the hosts
		lost = map[string]bool{}
	}
	for _, h := range slices.Sorted(maps.Keys(lost)) {
		out = append(out, fmt.Sprintf("host %s: no path leads to it", h))
	}
	for _, p := range slices.Sorted(maps.Keys(spines)) {
		here := slices.DeleteFunc(slices.Clone(sights), func(s Sight) bool {
			return s.Spine != p || lost[s.From] || lost[s.To] || cut[[2]string{s.From, p}] || cut[[2]string{s.To, p}]
		})
		out = append(out, ofSpine(p, here)...)
	}
	return out
}

// count says how many sights of a kind there are, and how many of them work.
func count(sights []Sight, of func(Sight) bool) (seen, alive int) {
	for _, s := range sights {
		if of(s) {
			seen++
			if s.Alive {
				alive++
			}
		}
	}
	return seen, alive
}

func ofSpine(p string, here []Sight) (out []string) {
	seen, alive := count(here, func(Sight) bool { return true })
	if seen == 0 || seen == alive {
		return nil
	}
	if alive == 0 {
		what := fmt.Sprintf("spine %s passes nothing on", p)
		if slices.ContainsFunc(here, func(s Sight) bool { return s.Routed }) {
			what += ", though routing says it works"
		}
		return []string{what + ": traffic takes other paths"}
	}
	hosts := map[string]bool{}
	for _, s := range here {
		hosts[s.From], hosts[s.To] = true, true
	}
	blamed := map[string]bool{}
	for _, h := range slices.Sorted(maps.Keys(hosts)) {
		if seen, alive := count(here, func(s Sight) bool { return s.From == h || s.To == h }); seen > 0 && alive == 0 {
			blamed[h] = true
			out = append(out, fmt.Sprintf("link of host %s to %s passes nothing: its traffic takes other paths", h, p))
		}
	}
	var rest []string
	for _, s := range here {
		if !s.Alive && !blamed[s.From] && !blamed[s.To] {
			rest = append(rest, s.From+" to "+s.To)
		}
	}
	if len(rest) > 0 {
		out = append(out, fmt.Sprintf("spine %s does not lead from %s", p, strings.Join(rest, ", from ")))
	}
	return out
}
