package placement

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/cairnstore/cairn/proto/status"
)

// Policy is how hosts that fit a VM are ordered.
type Policy string

// The static policies. Local is the default.
const (
	NearData Policy = "local"    // most local bytes, then most headroom
	BestFit  Policy = "min"      // least headroom left: keeps whole hosts free for large VMs
	WorstFit Policy = "max"      // most headroom left: keeps every host lightly loaded
	Balanced Policy = "balanced" // least difference between the CPU and the memory share in use
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

// Host is a host as placement sees it. Used is what the VMs placed there ask
// for, whether they run or not.
type Host struct {
	Name        string
	Up          bool
	CPUs        uint32
	UsedCPUs    uint32
	MemoryBytes uint64
	UsedMemory  uint64
	LocalBytes  uint64 // of the VM's volumes, in sync on this host
}

// VMRequest asks for a host for a VM.
type VMRequest struct {
	Name        string
	CPUs        uint32
	MemoryBytes uint64
	Policy      Policy // "": NearData
	Hosts       []Host
}

// HostScore is what one host scored, for an explanation. Shares are in 1/1000
// so that the order does not hang on the last bit of a float.
type HostScore struct {
	Host     Host
	Refused  string // why it does not fit; "" when it does
	Local    int    // local bytes, in % of the most any fitting host has; 0 ≤ Local ≤ 100
	Headroom int    // smaller of the CPU and memory shares left with the VM, in 1/1000
	Skew     int    // difference between the CPU and memory shares in use with the VM, in 1/1000
	down     bool   // it would fit if it were up
}

// VMPlan is an answer and the scores behind it, best first.
type VMPlan struct {
	Request VMRequest
	Host    string
	Reason  string // one sentence
	Scores  []HostScore
}

// PlaceVM chooses the best host that is up and has the CPUs and the memory.
//
// The plan has the scores also when there is an error: Invalid, NoSpace, or
// Unavailable when it would work if a host that is down came back.
func PlaceVM(req VMRequest) (VMPlan, error) {
	plan := VMPlan{Request: req}
	policy, err := ParsePolicy(string(req.Policy))
	if err != nil {
		return plan, err
	}
	plan.Request.Policy = policy
	if req.CPUs == 0 || req.MemoryBytes == 0 {
		return plan, status.Errorf(status.Invalid, "VM %s asks for %d CPUs and %d bytes of memory: both must be above 0", req.Name, req.CPUs, req.MemoryBytes)
	}
	plan.Scores = scoreHosts(req)
	slices.SortFunc(plan.Scores, func(a, b HostScore) int { return order(policy, a, b) })
	if len(plan.Scores) == 0 || plan.Scores[0].Refused != "" {
		return plan, noHost(req, plan.Scores)
	}
	plan.Host = plan.Scores[0].Host.Name
	plan.Reason = reason(plan)
	return plan, nil
}

func scoreHosts(req VMRequest) []HostScore {
	scores := make([]HostScore, 0, len(req.Hosts))
	var most uint64
	for _, h := range req.Hosts {
		s := HostScore{Host: h}
		s.Refused, s.down = refuse(req, h)
		if s.Refused == "" {
			most = max(most, h.LocalBytes)
		}
		scores = append(scores, s)
	}
	for i := range scores {
		s := &scores[i]
		if s.Refused != "" {
			continue
		}
		cpu := share(uint64(s.Host.UsedCPUs)+uint64(req.CPUs), uint64(s.Host.CPUs))
		mem := share(s.Host.UsedMemory+req.MemoryBytes, s.Host.MemoryBytes)
		s.Headroom = 1000 - max(cpu, mem)
		s.Skew = max(cpu, mem) - min(cpu, mem)
		if most > 0 {
			s.Local = int(float64(s.Host.LocalBytes)/float64(most)*100 + 0.5)
		}
	}
	return scores
}

// share returns part/whole in 1/1000, rounded; part ≤ whole.
func share(part, whole uint64) int { return int(float64(part)/float64(whole)*1000 + 0.5) }

// refuse says why a host does not fit, and whether being down is the only
// reason.
func refuse(req VMRequest, h Host) (why string, onlyDown bool) {
	cpus := uint64(h.CPUs) - min(uint64(h.CPUs), uint64(h.UsedCPUs))
	mem := free(h.MemoryBytes, h.UsedMemory)
	switch {
	case uint64(req.CPUs) > cpus:
		why = fmt.Sprintf("has %d of %s free", cpus, plural(int(h.CPUs), "CPU"))
	case req.MemoryBytes > mem:
		why = fmt.Sprintf("has %s of %s memory free", Bytes(mem), Bytes(h.MemoryBytes))
	case !h.Up:
		return "is down", true
	}
	if why != "" && !h.Up {
		why = "is down and " + why
	}
	return why, false
}

// order compares two hosts under a policy, better first. Names decide last, so
// that the answer never depends on the order of the request.
func order(p Policy, a, b HostScore) int {
	if fits := b2i(a.Refused != "") - b2i(b.Refused != ""); fits != 0 {
		return fits
	}
	local, room, name := cmp.Compare(b.Local, a.Local), cmp.Compare(b.Headroom, a.Headroom), cmp.Compare(a.Host.Name, b.Host.Name)
	switch p {
	case BestFit:
		return cmp.Or(-room, local, name)
	case WorstFit:
		return cmp.Or(room, local, name)
	case Balanced:
		return cmp.Or(cmp.Compare(a.Skew, b.Skew), room, local, name)
	}
	return cmp.Or(local, room, name)
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// reason is one sentence with the figures the policy went by.
func reason(p VMPlan) string {
	s, fitting := p.Scores[0], 0
	for _, o := range p.Scores {
		fitting += b2i(o.Refused == "")
	}
	h := s.Host
	room := fmt.Sprintf("with it %d of %s and %s of %s memory stay free",
		h.CPUs-h.UsedCPUs-p.Request.CPUs, plural(int(h.CPUs), "CPU"), Bytes(h.MemoryBytes-h.UsedMemory-p.Request.MemoryBytes), Bytes(h.MemoryBytes))
	if fitting == 1 {
		return fmt.Sprintf("%s is the only one of %s that fits: it has %s of the data, and %s", h.Name, plural(len(p.Scores), "host"), Bytes(h.LocalBytes), room)
	}
	from := fmt.Sprintf("of the %d hosts that fit", fitting)
	next := p.Scores[1]
	switch p.Request.Policy {
	case BestFit:
		return fmt.Sprintf("%s is the tightest fit %s: %s", h.Name, from, room)
	case WorstFit:
		return fmt.Sprintf("%s has the most room %s: %s", h.Name, from, room)
	case Balanced:
		return fmt.Sprintf("%s keeps CPU and memory use closest %s, %.1f %% apart: %s", h.Name, from, float64(s.Skew)/10, room)
	}
	switch {
	case h.LocalBytes == 0:
		return fmt.Sprintf("no host that fits has any of the data, and %s has the most room %s: %s", h.Name, from, room)
	case next.Local == s.Local:
		return fmt.Sprintf("%s has %s of the data, as much as any %s (to 1 %%), and the most room of those: %s", h.Name, Bytes(h.LocalBytes), from, room)
	}
	return fmt.Sprintf("%s has the most of the data %s, %s (next is %s with %s): %s", h.Name, from, Bytes(h.LocalBytes), next.Host.Name, Bytes(next.Host.LocalBytes), room)
}

// noHost says why no host fits.
func noHost(req VMRequest, scores []HostScore) error {
	want := fmt.Sprintf("VM %s needs a host with %s and %s of memory free", req.Name, plural(int(req.CPUs), "CPU"), Bytes(req.MemoryBytes))
	if len(scores) == 0 {
		return status.Errorf(status.NoSpace, "%s, there is no host at all; add one", want)
	}
	kind, todo := status.NoSpace, "add a host, stop a VM or ask for less"
	var why []string
	for _, s := range scores { // sorted by name: none fits
		why = append(why, s.Host.Name+" "+s.Refused)
		if s.down {
			kind, todo = status.Unavailable, "bring a host back or ask again"
		}
	}
	return status.Errorf(kind, "%s, there is none: %s; %s", want, list(why), todo)
}

// Explain is the reason and a table of every host's scores, best first.
func (p VMPlan) Explain() string {
	rows := [][]string{{"HOST", "LOCAL", "LOCAL-%", "HEADROOM-%", "SKEW-%", "VERDICT"}}
	for i, s := range p.Scores {
		verdict, local, room, skew := s.Refused, "-", "-", "-"
		if s.Refused == "" {
			verdict = "fits"
			local, room, skew = fmt.Sprint(s.Local), fmt.Sprintf("%.1f", float64(s.Headroom)/10), fmt.Sprintf("%.1f", float64(s.Skew)/10)
			if i == 0 {
				verdict = "chosen"
			}
		}
		rows = append(rows, []string{s.Host.Name, Bytes(s.Host.LocalBytes), local, room, skew, verdict})
	}
	text := fmt.Sprintf("policy %s\n", p.Request.Policy)
	if p.Reason != "" {
		text += p.Reason + "\n"
	}
	return text + table(rows)
}
