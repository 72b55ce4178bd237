package server

import (
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
)

// The leader puts into the event log what nobody did and an admin wants to know
// when it was: a host that fell silent or is back, a pool that passed a threshold.

const (
	warnEvery = time.Second
	silentFor = 10 * time.Second // a host that is back sooner is no news
	poolSlack = 2                // percent below a threshold, so that one at its edge is no news all the time
)

// poolSteps are the thresholds, in percent.
var poolSteps = []int{95, 85, 75}

// warned is what the event log says last: what a leader knows of its
// predecessors' words.
type warned struct {
	silent map[string]int64 // hosts, and when that was said, as Unix nanoseconds
	step   int              // of the pool; 0: below all
	stepAt int64            // when that was said
}

const (
	saidSilent = "host %s does not answer"
	saidBack   = "host %s answers again"
	saidPast   = "the pool is past %d %%"
	saidBelow  = "the pool is below %d %% again"
)

// hear reads one event of a moment in Unix nanoseconds.
func (w *warned) hear(what string, at int64) {
	host, step := "", 0
	is := func(format string, to any) bool {
		n, err := fmt.Sscanf(what, format, to)
		return err == nil && n == 1
	}
	switch {
	case is(saidSilent, &host):
		w.silent[host] = at
	case is(saidBack, &host):
		delete(w.silent, host)
	case is(saidPast, &step):
		w.step, w.stepAt = step, at
	case is(saidBelow, &step):
		w.step, w.stepAt = 0, at
		for _, s := range poolSteps {
			if s < step {
				w.step = s
				break
			}
		}
	}
}

// news compares with the cluster as it is, and returns what is to be told.
func (w *warned) news(hosts []*pb.HostState) (out []string) {
	there := map[string]bool{}
	for _, h := range hosts {
		name := h.Host.Name
		there[name] = true
		switch {
		case !h.Up && w.silent[name] == 0 && (h.LastSeenMs < 0 || h.LastSeenMs >= silentFor.Milliseconds()):
			out = append(out, fmt.Sprintf(saidSilent, name)+": what its volumes' writers miss of it is left out, and made elsewhere if it stays away")
		case h.Up && h.LastSeenMs >= 0 && w.silent[name] != 0: // and not only by a new leader's good faith
			out = append(out, fmt.Sprintf(saidBack, name)+": its copies catch up")
		}
	}
	for name := range w.silent { // removed meanwhile
		if !there[name] {
			delete(w.silent, name)
		}
	}
	c := &Census{}
	for _, h := range hosts {
		if c.countHost(h); h.Up && h.LastSeenMs < 0 {
			return out // a new leader, which does not know yet how full the pool is
		}
	}
	if c.CapacityBytes == 0 {
		return out
	}
	percent := int(c.UsedBytes * 100 / c.CapacityBytes)
	step := 0
	for _, s := range poolSteps {
		if percent >= s || w.step >= s && percent >= s-poolSlack {
			step = s
			break
		}
	}
	switch {
	case step > w.step:
		out = append(out, fmt.Sprintf(saidPast+": %d %% of it is used, and %s", step, percent, c.whenFull()))
	case step < w.step:
		below := w.step
		for _, s := range poolSteps { // the lowest it has fallen below
			if s > step {
				below = s
			}
		}
		out = append(out, fmt.Sprintf(saidBelow+": %d %% of it is used", below, percent))
	}
	return out
}

// whenFull says it in words.
func (c *Census) whenFull() string {
	if s := c.SecondsToFull(); s >= 0 {
		return fmt.Sprintf("at the rate of the last half hour it is full in %v", (time.Duration(min(s, 1e9)) * time.Second).Round(time.Minute))
	}
	return "it does not fill now"
}

// warnLoop looks once in a while, while this node leads.
func (s *Server) warnLoop() {
	tick := time.NewTicker(warnEvery)
	defer tick.Stop()
	c := &scheduler{s: s, who: leaderName}
	var of *tenure
	var w *warned
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
		}
		t, err := s.lead()
		if err != nil {
			continue
		}
		if t != of {
			of, w = t, s.alreadyWarned()
		}
		if w == nil {
			of = nil // the state could not be read: again
			continue
		}
		t.tell(w)
		if err := c.warn(t, w); err != nil && s.ctx.Err() == nil {
			s.log.Warn("telling what has changed", "err", err)
		}
	}
}

func (s *Server) alreadyWarned() *warned {
	w := &warned{silent: map[string]int64{}}
	err := s.fsm.read(func(kv state.KV) {
		for _, e := range state.Events(kv, 0, state.KeptEvents) {
			if strings.HasPrefix(e.What, "host ") || strings.HasPrefix(e.What, "the pool ") {
				w.hear(e.What, e.TimeUnixNs)
			}
		}
	})
	if err != nil {
		return nil
	}
	return w
}

// warn tells the news; what was not taken is told at the next look.
func (c *scheduler) warn(t *tenure, w *warned) error {
	var hosts []*pb.HostState
	now := boottime()
	if err := c.s.fsm.read(func(kv state.KV) { hosts = t.hostStates(kv, now) }); err != nil {
		return err
	}
	for _, h := range hosts {
		if h.LastSeenMs < 0 && now < t.since+silentFor { // it may not know yet who leads
			h.Up = true
		}
	}
	for _, what := range w.news(hosts) {
		res, err := c.do(t, &pb.Command{Op: &pb.Command_Note{Note: &pb.Note{What: what}}})
		if err != nil {
			return err
		}
		if res.Status != 0 {
			continue
		}
		w.hear(what, c.s.cfg.clock().UnixNano())
	}
	t.tell(w)
	return nil
}

// tell lets those who ask for the hosts know since when something is so.
func (t *tenure) tell(w *warned) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.warned = warned{silent: maps.Clone(w.silent), step: w.step, stepAt: w.stepAt}
}

// silentSince is when the event log said that a host is silent; 0: it did not.
func (t *tenure) silentSince(host string) int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.warned.silent[host]
}

func (t *tenure) poolMark() *pb.PoolMark {
	t.mu.Lock()
	defer t.mu.Unlock()
	return &pb.PoolMark{Percent: uint32(t.warned.step), UnixNs: t.warned.stepAt}
}
