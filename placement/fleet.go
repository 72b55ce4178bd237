package placement

import (
	"cmp"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/cairnstore/cairn/proto/status"
)

// Kind is a resource that hosts have and VMs ask for.
type Kind int

// The resources, in the order explanations show them.
const (
	CPU       Kind = iota // thousandths of a processor
	Memory                // bytes
	Disk                  // bytes of local, reserved disk
	Bandwidth             // bytes a second of disk traffic
	kinds
)

var kindNames = [kinds]string{"CPU", "memory", "disk", "disk bandwidth"}

// Amounts is one number per resource.
type Amounts [kinds]uint64

func (a *Amounts) add(b Amounts) {
	for k := range a {
		a[k] += b[k]
	}
}

func (a *Amounts) sub(b Amounts) {
	for k := range a {
		a[k] -= min(a[k], b[k])
	}
}

// Percents is how much of each resource may be promised, in per cent of what
// there is; 0 means 100.
type Percents [kinds]uint32

// Machine is a host of a fleet.
type Machine struct {
	Name     string
	Up       bool
	Drained  bool
	Labels   map[string]string // also the failure domains
	Networks []string          // storage networks it reaches
	Capacity Amounts           // what there is
	Promised Percents          // what may be promised of it
}

// Job is a VM as a fleet's scheduler sees it.
type Job struct {
	Name     string
	Need     Amounts
	Labels   map[string]string // the host must have all of these
	Networks []string          // the host must reach all of these
	Group    string            // for Near and Apart of others; "" for none
	Near     string            // a group: only on hosts (domains) that have one of it, once there is one
	Apart    string            // a group: never on a host (domain) that has one of it
	Domain   string            // label that Near and Apart are about; "": the host
	Tenant   string
	Class    int // priority: higher goes first and may evict lower
	Batch    bool
	// DurationMs is how long it says it will run; 0: unknown, for ever.
	DurationMs int64
	// Sliced is what a batch VM that is paused until its turn will take then,
	// of processors; Need has 0 of them meanwhile.
	Sliced uint64
	// Gains is what part of the VM's reads and writes each host would serve
	// itself, by host; see Gain. Hosts that are not in it would serve none.
	Gains map[int]float64
}

// Wants is the processors a job takes, now or in its turn.
func (j *Job) Wants() uint64 { return max(j.Need[CPU], j.Sliced) }

// node is a machine with what is bound to it. A decision reads without the
// lock what Bind then checks again under it.
type node struct {
	Machine
	limit Amounts // capacity × per cent: 0 ≤ used ≤ limit, always

	mu   sync.Mutex // guards the fields below
	jobs map[string]*Job

	used [kinds]atomic.Uint64 // written under mu; a decision reads it without
}

// percentMax bounds over-commitment.
const percentMax = 10_000

// Fleet is the hosts and what is bound to them. Binding is safe from many
// goroutines; adding hosts and changing their state is not.
type Fleet struct {
	hosts   []*node
	byName  map[string]int
	largest Amounts // of any host's limits

	mu     sync.Mutex // guards the fields below
	where  map[string]int
	groups map[string]map[string]int // group, then label=value, to the number of its jobs there
	levels levels
}

// NewFleet returns a fleet without hosts.
func NewFleet() *Fleet {
	return &Fleet{byName: map[string]int{}, where: map[string]int{}, groups: map[string]map[string]int{}}
}

// Add adds a host and returns its number.
func (f *Fleet) Add(m Machine) (int, error) {
	if _, ok := f.byName[m.Name]; ok || m.Name == "" {
		return 0, status.Errorf(status.Invalid, "host %q is in the fleet already or has no name: give each host its own name", m.Name)
	}
	h := &node{Machine: m, jobs: map[string]*Job{}}
	for k := range kinds {
		pct := uint64(m.Promised[k])
		if pct == 0 {
			pct = 100
		}
		if pct > percentMax {
			return 0, status.Errorf(status.Invalid, "host %s cannot promise %d %% of its %s: 1 to %d are possible", m.Name, pct, kindNames[k], percentMax)
		}
		h.limit[k] = m.Capacity[k]/100*pct + m.Capacity[k]%100*pct/100 // as the metadata service counts
		f.largest[k] = max(f.largest[k], h.limit[k])
	}
	i := len(f.hosts)
	f.byName[m.Name] = i
	f.hosts = append(f.hosts, h)
	f.levels.add(i, h.level())
	return i, nil
}

// Len is the number of hosts.
func (f *Fleet) Len() int { return len(f.hosts) }

// Machine returns host i as it was added, and as it is now.
func (f *Fleet) Machine(i int) Machine { return f.hosts[i].Machine }

// SetUp and SetDrained change a host's state; no decision may run meanwhile.
func (f *Fleet) SetUp(i int, up bool) { f.hosts[i].Up = up }

// SetDrained marks a host as taking nothing new.
func (f *Fleet) SetDrained(i int, d bool) { f.hosts[i].Drained = d }

// Used returns what is bound to host i, and Limit what may be.
func (f *Fleet) Used(i int) Amounts { return f.hosts[i].load() }

// Limit is capacity × what may be promised of it.
func (f *Fleet) Limit(i int) Amounts { return f.hosts[i].limit }

func (h *node) load() (a Amounts) {
	for k := range a {
		a[k] = h.used[k].Load()
	}
	return a
}

// Jobs returns what is bound to host i, by name.
func (f *Fleet) Jobs(i int) []*Job {
	h := f.hosts[i]
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]*Job, 0, len(h.jobs))
	for _, j := range h.jobs {
		out = append(out, j)
	}
	slices.SortFunc(out, func(a, b *Job) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// Number returns a host's number by its name.
func (f *Fleet) Number(name string) (int, bool) {
	i, ok := f.byName[name]
	return i, ok
}

// Where returns the host a job is bound to.
func (f *Fleet) Where(name string) (int, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i, ok := f.where[name]
	return i, ok
}

// ErrConflict is what Bind returns when another scheduler was faster: decide
// again.
var ErrConflict = status.Errorf(status.Conflict, "the host filled up, or its group changed, since the decision: decide again")

// Bind gives host i to a job if it still passes every filter. It is the only
// way in, and checks under the host's lock: whatever several schedulers saw
// when they decided, nothing is ever promised twice.
func (f *Fleet) Bind(j *Job, i int) error {
	h := f.hosts[i]
	grouped := j.Group != "" || j.Near != "" || j.Apart != ""
	h.mu.Lock()
	defer h.mu.Unlock()
	if why := h.refuse(j); why != "" {
		return ErrConflict
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if at, ok := f.where[j.Name]; ok {
		return status.Errorf(status.Exists, "VM %s is on host %s already: release it first", j.Name, f.hosts[at].Name)
	}
	if grouped && f.groupRefusal(j, h) != "" {
		return ErrConflict
	}
	f.enter(j, h, i)
	return nil
}

// Hold enters a job where it is, whatever the filters would say: it is there.
func (f *Fleet) Hold(j *Job, i int) error {
	h := f.hosts[i]
	h.mu.Lock()
	defer h.mu.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	if at, ok := f.where[j.Name]; ok {
		return status.Errorf(status.Exists, "VM %s is on host %s already: release it first", j.Name, f.hosts[at].Name)
	}
	f.enter(j, h, i)
	return nil
}

// enter counts a job in; the host's lock and the fleet's are held.
func (f *Fleet) enter(j *Job, h *node, i int) {
	f.where[j.Name] = i
	f.count(j, h, 1)
	h.jobs[j.Name] = j
	for k := range kinds {
		h.used[k].Add(j.Need[k])
	}
	f.levels.move(i, h.level())
}

// Release takes a job off its host.
func (f *Fleet) Release(name string) error {
	i, ok := f.Where(name)
	if !ok {
		return status.Errorf(status.NotFound, "VM %s is on no host", name)
	}
	h := f.hosts[i]
	h.mu.Lock()
	defer h.mu.Unlock()
	j := h.jobs[name]
	if j == nil {
		return ErrConflict
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.where, name)
	f.count(j, h, -1)
	delete(h.jobs, name)
	for k := range kinds {
		h.used[k].Store(h.used[k].Load() - j.Need[k])
	}
	f.levels.move(i, h.level())
	return nil
}

// count notes that a job of a group came (1) or went (-1); f.mu is held. A
// group is counted per value of each label, and per host.
func (f *Fleet) count(j *Job, h *node, n int) {
	if j.Group == "" {
		return
	}
	g := f.groups[j.Group]
	if g == nil {
		g = map[string]int{}
		f.groups[j.Group] = g
	}
	g[""] += n
	g["host="+h.Name] += n
	for l, v := range h.Labels {
		if l != "host" {
			g[l+"="+v] += n
		}
	}
}

// groupRefusal is the affinity filter; f.mu is held.
func (f *Fleet) groupRefusal(j *Job, h *node) string {
	at := h.domain(j.Domain)
	if j.Apart != "" && f.groups[j.Apart][at] > 0 {
		return fmt.Sprintf("%s has a VM of group %s, which this one must stay apart from", at, j.Apart)
	}
	if g := f.groups[j.Near]; j.Near != "" && g[""] > 0 && g[at] == 0 {
		return fmt.Sprintf("%s has no VM of group %s, which this one must be near", at, j.Near)
	}
	return ""
}

// domain is "label=value" of a host.
func (h *node) domain(label string) string {
	if v, ok := h.Labels[label]; ok && label != "host" {
		return label + "=" + v
	}
	return "host=" + h.Name
}

// refuse says why a host cannot take a job, groups apart; "" when it can.
func (h *node) refuse(j *Job) string {
	switch {
	case !h.Up:
		return "is down"
	case h.Drained:
		return "is drained"
	}
	for k := range kinds {
		if used := h.used[k].Load(); j.Need[k] > h.limit[k]-min(h.limit[k], used) {
			return "has " + amount(k, h.limit[k]-min(h.limit[k], used)) + " of " + amount(k, h.limit[k]) + " " + kindNames[k] + " free"
		}
	}
	for l, v := range j.Labels {
		if h.Labels[l] != v {
			return fmt.Sprintf("has %s=%q, not %q", l, h.Labels[l], v)
		}
	}
	for _, n := range j.Networks {
		if !slices.Contains(h.Networks, n) {
			return "does not reach storage network " + n
		}
	}
	return ""
}

// Could reports whether a host would take a job if nothing were on it.
func (f *Fleet) Could(j *Job, i int) bool {
	h := f.hosts[i]
	for k := range kinds {
		if j.Need[k] > h.limit[k] {
			return false
		}
	}
	return h.refuseOther(j) == ""
}

// passes is refuse without its words, for the hot path.
func (h *node) passes(j *Job) bool {
	if !h.Up || h.Drained {
		return false
	}
	for k := range kinds {
		if j.Need[k] > 0 && h.used[k].Load()+j.Need[k] > h.limit[k] {
			return false
		}
	}
	return (len(j.Labels) == 0 && len(j.Networks) == 0) || h.refuse(j) == ""
}

// amount writes so much of a resource for a person.
func amount(k Kind, n uint64) string {
	switch k {
	case CPU:
		return fmt.Sprintf("%g", float64(n)/1000)
	case Bandwidth:
		return Bytes(n) + "/s"
	}
	return Bytes(n)
}

// Check verifies the fleet's invariants: what is used is the sum of what is
// bound, and within the limit. For tests and simulations; O(jobs).
func (f *Fleet) Check() error {
	for i, h := range f.hosts {
		var sum Amounts
		for _, j := range f.Jobs(i) {
			sum.add(j.Need)
		}
		if used := h.load(); used != sum {
			return status.Errorf(status.Internal, "host %s counts %v, its VMs ask for %v", h.Name, used, sum)
		}
		for k := range kinds {
			if sum[k] > h.limit[k] {
				return status.Errorf(status.Internal, "host %s promised %d of %d %s", h.Name, sum[k], h.limit[k], kindNames[k])
			}
		}
	}
	return nil
}
