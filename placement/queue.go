package placement

import (
	"cmp"
	"slices"

	"github.com/cairnstore/cairn/proto/status"
)

// QueueMax bounds a queue; more is refused.
const QueueMax = 100_000

// Order is how pending jobs are ordered.
type Order string

// The dynamic policies.
const (
	FIFO       Order = "fifo"        // as they came
	SJF        Order = "sjf"         // shortest declared duration first, with ageing
	RoundRobin Order = "round-robin" // the tenant that was served least for its weight
	Priority   Order = "priority"    // highest class first; bounded preemption
)

// Orders are all orders.
var Orders = []Order{FIFO, SJF, RoundRobin, Priority}

// Pending is a job in the queue.
type Pending struct {
	Job     *Job
	SinceMs int64
	seq     uint64 // ties: as they came
}

// Queue holds jobs that wait for a host. Pure: the time is an argument.
type Queue struct {
	Order Order
	// AgeMs is SJF's ageing limit: a job that has waited as long goes before
	// all that have not, oldest first, so that a stream of short jobs starves
	// nobody. 0 means an hour.
	AgeMs int64
	// Weights are RoundRobin's, by tenant; 0 means 1.
	Weights map[string]float64

	items  []Pending
	seq    uint64
	served map[string]float64 // by tenant: cost served ÷ weight (virtual time)
	clock  float64            // virtual time of the last one served; newcomers start here
}

// Len is the number of jobs that wait.
func (q *Queue) Len() int { return len(q.items) }

// Push adds a job.
func (q *Queue) Push(j *Job, nowMs int64) error {
	if len(q.items) >= QueueMax {
		return status.Errorf(status.NoSpace, "%d VMs wait for a host already: VM %s is not queued; try again later", QueueMax, j.Name)
	}
	q.wake(j.Tenant)
	q.seq++
	q.items = append(q.items, Pending{Job: j, SinceMs: nowMs, seq: q.seq})
	return nil
}

// wake lets a tenant that had nothing waiting start at the present: idle time
// is no credit, or it could shut the others out when it comes back.
func (q *Queue) wake(tenant string) {
	if q.served == nil {
		q.served = map[string]float64{}
	}
	waits := slices.ContainsFunc(q.items, func(p Pending) bool { return p.Job.Tenant == tenant })
	if !waits {
		q.served[tenant] = max(q.served[tenant], q.clock)
	}
}

// Pop takes the first job for which fits returns true; jobs before it stay
// where they are. With strict, only the very first is asked about: nothing
// overtakes it (an aged job is always strict, or its ageing would mean
// nothing).
func (q *Queue) Pop(nowMs int64, strict bool, fits func(*Job) bool) (*Job, int64) {
	slices.SortFunc(q.items, func(a, b Pending) int { return q.less(a, b, nowMs) })
	for i, p := range q.items {
		if fits(p.Job) {
			q.items = slices.Delete(q.items, i, i+1)
			q.serve(p.Job)
			return p.Job, nowMs - p.SinceMs
		}
		if strict || q.aged(p, nowMs) {
			break
		}
	}
	return nil, 0
}

func (q *Queue) aged(p Pending, nowMs int64) bool {
	limit := q.AgeMs
	if limit == 0 {
		limit = 3600_000
	}
	return q.Order == SJF && nowMs-p.SinceMs >= limit
}

func (q *Queue) less(a, b Pending, nowMs int64) int {
	fifo := int(int64(a.seq) - int64(b.seq))
	switch q.Order {
	case SJF:
		aa, ba := q.aged(a, nowMs), q.aged(b, nowMs)
		switch {
		case aa != ba:
			return b2i(ba) - b2i(aa)
		case aa:
			return fifo
		}
		if d := declared(a.Job) - declared(b.Job); d != 0 {
			return sign(d)
		}
	case RoundRobin:
		if a.Job.Tenant != b.Job.Tenant {
			x, y := q.served[a.Job.Tenant], q.served[b.Job.Tenant]
			switch {
			case x < y:
				return -1
			case x > y:
				return 1
			}
			return cmp.Compare(a.Job.Tenant, b.Job.Tenant)
		}
	case Priority:
		if a.Job.Class != b.Job.Class {
			return b.Job.Class - a.Job.Class
		}
	}
	return fifo
}

// declared is a job's duration; one that says none counts as the longest.
func declared(j *Job) int64 {
	if j.DurationMs <= 0 {
		return 1 << 62
	}
	return j.DurationMs
}

func sign(d int64) int {
	if d < 0 {
		return -1
	}
	return b2i(d > 0)
}

// serve charges a tenant by processors (start-time fair queueing: Goyal, Vin,
// Cheng 1996), so that a tenant of large VMs gets no more than one of small.
func (q *Queue) serve(j *Job) {
	w := q.Weights[j.Tenant]
	if w <= 0 {
		w = 1
	}
	q.clock = q.served[j.Tenant]
	q.served[j.Tenant] += float64(max(j.Need[CPU], 1)) / w
}

// PreemptMax bounds how many VMs one job may evict.
const PreemptMax = 4

// Eviction is what would make room for a job.
type Eviction struct {
	Host    int
	Victims []*Job
}

// Preempt finds the host where a job fits after the least is evicted: lowest
// classes first, then fewest VMs, then least CPU. It evicts nothing of an
// equal or a higher class, and at most PreemptMax VMs.
func Preempt(f *Fleet, j *Job) (Eviction, bool) {
	best, bestClass, bestCPU, found := Eviction{}, 0, uint64(0), false
	for i, h := range f.hosts {
		if !h.Up || h.Drained || h.refuseOther(j) != "" || f.apart(j, h) != "" {
			continue
		}
		victims, ok := h.victims(j, f.Jobs(i))
		if !ok {
			continue
		}
		top, cpu := -1<<62, uint64(0)
		for _, v := range victims {
			top, cpu = max(top, v.Class), cpu+v.Need[CPU]
		}
		better := !found || top < bestClass || top == bestClass && (len(victims) < len(best.Victims) ||
			len(victims) == len(best.Victims) && cpu < bestCPU)
		if better {
			best, bestClass, bestCPU, found = Eviction{Host: i, Victims: victims}, top, cpu, true
		}
	}
	return best, found
}

// refuseOther is refuse without the resources.
func (h *node) refuseOther(j *Job) string {
	other := *j
	other.Need = Amounts{}
	return h.refuse(&other)
}

// victims picks whom to evict from a host, and then spares whoever need not go.
func (h *node) victims(j *Job, jobs []*Job) ([]*Job, bool) {
	jobs = slices.DeleteFunc(jobs, func(v *Job) bool { return v.Class >= j.Class })
	slices.SortStableFunc(jobs, func(a, b *Job) int {
		if a.Class != b.Class {
			return a.Class - b.Class
		}
		return sign(int64(b.Need[CPU]) - int64(a.Need[CPU]))
	})
	used := h.load()
	fits := func(u Amounts) bool {
		for k := range kinds {
			if u[k]+j.Need[k] > h.limit[k] {
				return false
			}
		}
		return true
	}
	var out []*Job
	for _, v := range jobs {
		if fits(used) {
			break
		}
		if len(out) == PreemptMax {
			return nil, false
		}
		out = append(out, v)
		used.sub(v.Need)
	}
	if !fits(used) {
		return nil, false
	}
	for i := len(out) - 1; i >= 0; i-- { // the highest class is spared first
		again := used
		again.add(out[i].Need)
		if fits(again) {
			used, out = again, slices.Delete(out, i, i+1)
		}
	}
	return out, true
}

// Slices shares a host's processors among batch VMs by time: as many of them
// run as fit into cpu (thousandths), the rest is paused, and each turn of
// quantumMs begins with the next one by name, so that all of a size run equally
// long. VMs that are not batch are never paused. Pure: a host process computes
// the same after a restart.
func Slices(batch []*Job, cpu uint64, quantumMs, nowMs int64) (run, pause []*Job) {
	var turn []*Job
	for _, j := range batch {
		if j.Batch {
			turn = append(turn, j)
		}
	}
	slices.SortFunc(turn, func(a, b *Job) int { return cmp.Compare(a.Name, b.Name) })
	if len(turn) == 0 {
		return nil, nil
	}
	first := int((nowMs / max(quantumMs, 1)) % int64(len(turn)))
	for i := range turn {
		j := turn[(first+i)%len(turn)]
		if j.Need[CPU] <= cpu {
			cpu -= j.Need[CPU]
			run = append(run, j)
		} else {
			pause = append(pause, j)
		}
	}
	return run, pause
}

// SharesMax bounds how many batch VMs share one's processors: each gets at
// least this part of the time.
const SharesMax = 4

// ShareHost finds a host where a batch job that fits nowhere as a whole can
// take turns: all but its processors and disk traffic is free, and batch VMs
// hold the processors. The one with the fewest in turns is best.
func ShareHost(f *Fleet, j *Job) (host int, ok bool) {
	if !j.Batch {
		return 0, false
	}
	lean := *j
	lean.Need[CPU], lean.Need[Bandwidth] = 0, 0
	best, fewest := -1, 0.0
	for i, h := range f.hosts {
		if h.refuse(&lean) != "" || f.apart(&lean, h) != "" {
			continue
		}
		var running, all uint64
		for _, o := range f.Jobs(i) {
			if o.Batch {
				running, all = running+o.Need[CPU], all+o.Wants()
			}
		}
		shares := float64(all+j.Wants()) / float64(max(running, 1))
		if running < j.Need[CPU] || shares > SharesMax {
			continue
		}
		if best < 0 || shares < fewest {
			best, fewest = i, shares
		}
	}
	return best, best >= 0
}

// Charge tells a queue what a tenant has already: RoundRobin serves the one
// with the least for its weight first.
func (q *Queue) Charge(tenant string, cpu uint64) {
	if q.served == nil {
		q.served = map[string]float64{}
	}
	w := q.Weights[tenant]
	if w <= 0 {
		w = 1
	}
	q.served[tenant] += float64(cpu) / w
}

// ParseOrder reads an order's name; "" is fifo.
func ParseOrder(name string) (Order, error) {
	if name == "" {
		return FIFO, nil
	}
	if o := Order(name); slices.Contains(Orders, o) {
		return o, nil
	}
	return "", status.Errorf(status.Invalid, "there is no queue order %q: use fifo, sjf, round-robin or priority", name)
}
