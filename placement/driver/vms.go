package driver

import (
	"fmt"
	"slices"

	"github.com/cairnstore/cairn/meta/server"
	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/placement"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// Bounds of one turn of the queue.
const (
	refusalsMax    = 64   // decisions that find no host; the rest of the queue waits for the next turn
	defaultDelayMs = 5000 // of delay scheduling
)

// farBelow is how much less of its traffic a VM must find local on the host it
// could have now than on the best one, to wait for that.
const farBelow = 0.2

// CheckPolicy implements server.Placer.
func (placer) CheckPolicy(p *pb.Placement) error {
	if _, err := placement.ParsePolicy(p.GetPolicy()); err != nil {
		return err
	}
	_, err := placement.ParseOrder(p.GetOrder())
	return err
}

// PlaceVM implements server.Placer. A VM that others wait before, or that a
// better host may soon have room for, is to wait: Unavailable.
func (placer) PlaceVM(p *server.Picture, name string) (host, reason string, err error) {
	s, err := newScene(p)
	if err != nil {
		return "", "", err
	}
	vm, err := s.vm(name)
	if err != nil {
		return "", "", err
	}
	j := s.asNew(vm)
	d, err := s.decide(j)
	if err != nil {
		return "", "", err
	}
	if waits := s.delay(j, d, 0); waits > 0 {
		return "", "", status.Errorf(status.Unavailable, "VM %s waits up to %d ms for a host with more of its data: %s now", name, waits, s.sched.Reason(j, d))
	}
	return p.Hosts[d.Host].Name, s.sched.Reason(j, d), nil
}

// asNew is a VM as if it came now: its own place is free for it.
func (s *scene) asNew(vm *pb.VM) *placement.Job {
	if _, on := s.fleet.Where(vm.Name); on {
		if err := s.fleet.Release(vm.Name); err != nil {
			panic("driver: a VM of the scene cannot be taken out: " + err.Error())
		}
	}
	j := s.job(&pb.VM{Name: vm.Name, Cpus: vm.Cpus, MemoryBytes: vm.MemoryBytes, Needs: vm.Needs})
	s.gains(j)
	return j
}

// decide asks the core, and says Unavailable where a host that is down is what
// is missing.
func (s *scene) decide(j *placement.Job) (placement.Decision, error) {
	d := s.sched.Decide(j)
	if d.Host >= 0 {
		return d, nil
	}
	err := s.sched.None(j)
	for i, h := range s.pic.Hosts {
		if !h.Up && !h.Drained {
			s.fleet.SetUp(i, true)
			back := s.sched.Decide(j).Host == i
			s.fleet.SetUp(i, false)
			if back {
				return d, status.Errorf(status.Unavailable, "%w; host %s would fit and is down", err, h.Name)
			}
		}
	}
	return d, err
}

// delay is how much longer a VM that has waited should wait for a host with
// more of its data than the decision's (delay scheduling: Zaharia et al. 2010).
func (s *scene) delay(j *placement.Job, d placement.Decision, waitedMs int64) int64 {
	limit := s.pic.Policy.GetDelayMs()
	if limit == 0 {
		limit = defaultDelayMs
	}
	if s.sched.Policy != placement.NearData || d.Gain >= s.reachable(j)-farBelow {
		return 0
	}
	return limit - waitedMs
}

// reachable is the best gain on a host that could ever take the VM: up, not
// drained, large enough.
func (s *scene) reachable(j *placement.Job) (best float64) {
	for i, g := range j.Gains {
		if g > best && s.fleet.Could(j, i) {
			best = g
		}
	}
	return best
}

// Turn implements server.Placer: who of those that wait goes where.
func (placer) Turn(p *server.Picture) []*pb.BindVM {
	s, err := newScene(p)
	if err != nil {
		return nil // refused when the policy was set
	}
	t := &turn{scene: s, q: placement.Queue{Order: s.order, AgeMs: p.Policy.GetAgeMs(), Weights: p.Policy.GetWeights()}}
	t.fill()
	for t.refused < refusalsMax {
		if j, _ := t.q.Pop(p.NowMs, false, t.fits); j == nil {
			break
		}
	}
	if len(t.binds) == 0 && s.order == placement.Priority {
		t.preempt()
	}
	return t.binds
}

// turn is one turn of the queue.
type turn struct {
	*scene
	q       placement.Queue
	binds   []*pb.BindVM
	refused int
	first   *placement.Job // that found no host
}

// fill pushes who waits, longest first, and charges tenants with what they
// have: the queue's memory is the cluster's state, so a new leader goes on
// where the old one was.
func (t *turn) fill() {
	var wait []*pb.VM
	for _, vm := range t.pic.VMs {
		switch {
		case vm.GetQueue().GetStep() == state.StepQueued:
			wait = append(wait, vm)
		case vm.Host != "" && vm.Desired != "stopped":
			t.q.Charge(vm.GetNeeds().GetTenant(), state.Need(vm)[0])
		}
	}
	slices.SortStableFunc(wait, func(a, b *pb.VM) int {
		return int(min(max(a.Queue.SinceUnixNs-b.Queue.SinceUnixNs, -1), 1))
	})
	for _, vm := range wait {
		if err := t.q.Push(t.job(vm), vm.Queue.SinceUnixNs/1e6); err != nil {
			return // the queue is full; the rest comes when it is shorter
		}
	}
}

// fits decides for one VM, and binds it in the scene and in the answer.
func (t *turn) fits(j *placement.Job) bool {
	if t.refused >= refusalsMax {
		return false
	}
	vm := t.vms[j.Name]
	t.gains(j)
	d := t.sched.Decide(j)
	switch {
	case d.Host < 0:
		if host, ok := placement.ShareHost(t.fleet, j); ok {
			return t.share(j, vm, host)
		}
		if t.first == nil {
			t.first = j
		}
		t.refused++
		return false
	case t.delay(j, d, t.pic.NowMs-vm.Queue.SinceUnixNs/1e6) > 0:
		t.refused++
		return false
	}
	why := t.sched.Reason(j, d)
	if err := t.fleet.Bind(j, d.Host); err != nil {
		return false
	}
	t.bind(vm, d.Host, &pb.VMQueue{Step: state.StepStarting, Reason: why})
	return true
}

// share lets a batch VM take turns with others.
func (t *turn) share(j *placement.Job, vm *pb.VM, host int) bool {
	j.Sliced, j.Need[placement.CPU], j.Need[placement.Bandwidth] = j.Need[placement.CPU], 0, 0
	if err := t.fleet.Bind(j, host); err != nil {
		return false
	}
	name := t.pic.Hosts[host].Name
	t.bind(vm, host, &pb.VMQueue{Step: state.StepStarting, Sliced: true, Reason: "takes turns with the other batch VMs of host " + name})
	return true
}

func (t *turn) bind(vm *pb.VM, host int, q *pb.VMQueue) {
	t.binds = append(t.binds, &pb.BindVM{Vm: vm.Name, Revision: vm.Revision, Host: t.pic.Hosts[host].Name, Desired: "running", Queue: q})
}

// preempt makes room for the first that found none, unless room is being made
// already: what leaves is not counted twice.
func (t *turn) preempt() {
	if t.first == nil {
		return
	}
	for _, vm := range t.pic.VMs {
		if vm.GetQueue().GetStep() == state.StepEvicting {
			return
		}
	}
	e, ok := placement.Preempt(t.fleet, t.first)
	if !ok {
		return
	}
	for _, v := range e.Victims {
		vm := t.vms[v.Name]
		t.bind(vm, e.Host, &pb.VMQueue{Step: state.StepEvicting,
			Reason: fmt.Sprintf("gives way to VM %s (priority %d, its own is %d)", t.first.Name, t.first.Class, v.Class)})
	}
}

// Leave implements server.Placer.
func (placer) Leave(p *server.Picture, vms []*pb.VM, limit int) (binds []*pb.BindVM) {
	s, err := newScene(p)
	if err != nil {
		return nil // refused when the policy was set
	}
	for _, vm := range vms {
		at, ok := s.fleet.Number(vm.Host)
		if len(binds) == limit || !ok {
			break
		}
		j := s.asNew(vm)
		d := s.sched.DecideBut(j, at)
		if d.Host < 0 || s.fleet.Bind(j, d.Host) != nil {
			if err := s.fleet.Hold(s.job(vm), at); err != nil {
				panic("driver: a VM that stays cannot be held: " + err.Error())
			}
			continue
		}
		binds = append(binds, &pb.BindVM{Vm: vm.Name, Revision: vm.Revision, Host: vm.Host, Desired: vm.Desired, Queue: &pb.VMQueue{Step: state.StepEvicting,
			NextHost: p.Hosts[d.Host].Name, Sliced: vm.GetQueue().GetSliced(), Reason: fmt.Sprintf("host %s is drained: %s", vm.Host, s.sched.Reason(j, d))}})
	}
	return binds
}
