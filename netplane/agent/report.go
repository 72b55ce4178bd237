package agent

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cairnstore/cairn/netplane"
	"github.com/cairnstore/cairn/netplane/bird"
	"github.com/cairnstore/cairn/netplane/kernel"
)

// Report is what a node says of its network. The JSON names are those of
// `cairn net show -o json`.
type Report struct {
	Node     string         `json:"node"`
	Protocol bird.Protocol  `json:"protocol"`
	Links    []Link         `json:"links"`
	Sessions []bird.Session `json:"sessions"`
	Routes   []Route        `json:"routes"`
	Problems []string       `json:"problems"`
	BIRD     BIRD           `json:"bird"`
}

// BIRD is the routing daemon.
type BIRD struct {
	Pid      int    `json:"pid"` // 0: not running
	Restarts int    `json:"restarts"`
	Why      string `json:"why"` // of the last restart
}

// Link is a network interface of the storage network.
type Link struct {
	Name    string   `json:"name"`
	To      string   `json:"to"` // the node at the other end
	Up      bool     `json:"up"`
	Carrier bool     `json:"carrier"`
	Addrs   []string `json:"addrs"`
}

// Route is a destination of the storage network in the kernel.
type Route struct {
	To     string   `json:"to"`
	Owner  string   `json:"owner"`  // bird, topology, added
	Metric int      `json:"metric"` // lower ones win
	Hops   []string `json:"hops"`
}

// Event is something that happened to a node's network.
type Event struct {
	Seq   uint64    `json:"seq"`
	Time  time.Time `json:"time"`
	Node  string    `json:"node"`
	What  string    `json:"what"`
	Cause string    `json:"cause"`
}

// maxEvents bounds what a node remembers.
const maxEvents = 2000

// causeFor is how long after a cause its effects may come.
const causeFor = 15 * time.Second

// journal keeps the last events. The zero value is ready.
type journal struct {
	mu   sync.Mutex // guards the fields below
	last uint64
	list []Event
	root Event // the last thing that was not an effect of another
}

// add enters an event. Without a cause of its own it is an effect of the last
// one that had one.
func (j *journal) add(what, cause string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.last++
	e := Event{Seq: j.last, Time: time.Now(), What: what, Cause: cause}
	switch {
	case cause != "":
		j.root = e
	case time.Since(j.root.Time) < causeFor:
		e.Cause = fmt.Sprintf("#%d: %s", j.root.Seq, j.root.What)
	}
	j.list = append(j.list, e)
	if len(j.list) > maxEvents {
		j.list = slices.Delete(j.list, 0, len(j.list)-maxEvents)
	}
}

// causeless reports whether nothing of late could be the cause of something.
func (j *journal) causeless() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return time.Since(j.root.Time) >= causeFor
}

// Events returns the events after a number, oldest first.
func (a *Agent) Events(after uint64) []Event {
	a.events.mu.Lock()
	defer a.events.mu.Unlock()
	i, _ := slices.BinarySearchFunc(a.events.list, after+1, func(e Event, seq uint64) int { return cmp.Compare(e.Seq, seq) })
	out := slices.Clone(a.events.list[i:])
	for i := range out {
		out[i].Node = a.cfg.Node
	}
	return out
}

// Note enters an event of somebody who uses this network.
func (a *Agent) Note(what, cause string) { a.events.add(what, cause) }

// changed takes the reconciler's news.
func (a *Agent) changed(rep kernel.Report) {
	for _, p := range rep.Problems {
		a.events.add(p, "seen in the kernel")
	}
	for _, c := range rep.Changes {
		a.events.add(c.String(), "")
	}
	if rep.Err != nil {
		a.events.add(rep.Err.Error(), "refused by the kernel")
	}
}

// watch turns changes of links, sessions and next hops into events.
func (a *Agent) watch() {
	t := time.NewTicker(watchEvery)
	defer t.Stop()
	old, first := map[string]string{}, true
	for {
		select {
		case <-a.quit:
			return
		case <-t.C:
		}
		rep, err := a.Report()
		if err != nil {
			continue // the routing daemon is being started again, which is an event of its own
		}
		now := facts(rep)
		if !first {
			a.compare(old, now)
		}
		old, first = now, false
	}
}

// facts are what a report says, each under a name; causes come first in order.
func facts(r Report) map[string]string {
	out := map[string]string{"0 BIRD": fmt.Sprintf("%d restarts", r.BIRD.Restarts)}
	for _, l := range r.Links {
		state := "up"
		if !l.Up {
			state = "switched off"
		} else if !l.Carrier {
			state = "without carrier"
		}
		out[fmt.Sprintf("1 link %s to %s", l.Name, l.To)] = state
	}
	for _, s := range r.Sessions {
		out["2 session "+s.Name] = strings.TrimSpace(s.State + " " + s.Info)
	}
	for _, rt := range r.Routes {
		if rt.Owner == "bird" {
			out["3 route to "+rt.To] = strings.Join(rt.Hops, ", ")
		}
	}
	return out
}

func (a *Agent) compare(old, now map[string]string) {
	var names []string
	for n, v := range now {
		if old[n] != v {
			names = append(names, n)
		}
	}
	for n := range old {
		if _, ok := now[n]; !ok {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	for _, n := range names {
		was, is, cause := cmp.Or(old[n], "none"), cmp.Or(now[n], "none"), ""
		if n[0] < '2' {
			cause = "seen in the kernel"
		}
		if _, info, ok := strings.Cut(is, "Error: "); ok {
			cause = info
		}
		if n[0] == '3' && a.events.causeless() {
			cause = "told by neighbours"
		}
		a.events.add(fmt.Sprintf("%s: %s, was %s", n[2:], is, was), cause)
	}
}

// Report looks at the kernel and asks the routing daemon. When that does not
// answer, the rest is there all the same.
func (a *Agent) Report() (Report, error) {
	a.mu.Lock()
	top, added := a.top, slices.Clone(a.added)
	a.mu.Unlock()
	rep := Report{Node: a.cfg.Node, Protocol: top.Protocol, Links: []Link{}, Sessions: []bird.Session{}, Routes: []Route{}, Problems: []string{}}
	st, err := a.kernel.State()
	if err != nil {
		return rep, err
	}
	to := map[string]string{}
	for _, c := range top.Cables {
		switch a.cfg.Node {
		case c.Host:
			to[c.HostLink] = c.Spine
		case c.Spine:
			to[c.SpineLink] = c.Host
		}
	}
	for _, l := range st.Links {
		if to[l.Name] == "" {
			continue
		}
		k := Link{Name: l.Name, To: to[l.Name], Up: l.Up, Carrier: l.Carrier, Addrs: []string{}}
		for _, p := range l.Addrs {
			k.Addrs = append(k.Addrs, p.String())
		}
		rep.Links = append(rep.Links, k)
	}
	rep.Routes = routes(st.Routes, added)
	last := a.kernel.Status()
	rep.Problems = append(rep.Problems, last.Problems...)
	if last.Err != nil {
		rep.Problems = append(rep.Problems, last.Err.Error())
	}
	if a.bird == nil {
		return rep, nil
	}
	b, err := a.bird.Status()
	rep.BIRD = BIRD{Pid: b.Pid, Restarts: b.Restarts, Why: b.Why}
	rep.Sessions = append(rep.Sessions, b.Sessions...)
	if err != nil {
		rep.Problems = append(rep.Problems, err.Error())
	}
	return rep, err
}

// routes are those of the storage network, BIRD's and ours.
func routes(have []netplane.Installed, added []netplane.Route) []Route {
	ours := map[netip.Prefix]bool{}
	for _, r := range added {
		ours[r.To] = true
	}
	out := []Route{}
	for _, r := range have {
		v := Route{To: r.To.String(), Metric: r.Metric, Hops: []string{}}
		if r.Refuse {
			v.Hops = append(v.Hops, "refused")
		}
		switch {
		case r.Protocol == netplane.Protocol && ours[r.To]:
			v.Owner = "added"
		case r.Protocol == netplane.Protocol:
			v.Owner = "topology"
		case r.Protocol == bird.KernelProtocol:
			v.Owner = "bird"
		default:
			continue
		}
		for _, h := range r.Hops {
			v.Hops = append(v.Hops, h.String())
		}
		slices.Sort(v.Hops)
		out = append(out, v)
	}
	return merge(out)
}

// merge puts the next hops of one destination together: the kernel lists an
// IPv6 route of several as several.
func merge(rs []Route) []Route {
	slices.SortStableFunc(rs, func(a, b Route) int { return cmp.Or(cmp.Compare(a.To, b.To), cmp.Compare(a.Metric, b.Metric)) })
	out := rs[:0]
	for _, r := range rs {
		if n := len(out); n > 0 && out[n-1].To == r.To && out[n-1].Metric == r.Metric {
			for _, h := range r.Hops {
				if !slices.Contains(out[n-1].Hops, h) {
					out[n-1].Hops = append(out[n-1].Hops, h)
				}
			}
			continue
		}
		out = append(out, r)
	}
	return out
}
