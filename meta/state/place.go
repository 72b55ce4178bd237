package state

import (
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// Where VMs are: the last word on room. Whoever decides, one scheduler or many,
// and from however old a picture, a VM is bound here, by a command, and only if
// it fits then. 0 ≤ Σ Need of a host's VMs ≤ Limit of the host, always, unless
// the host itself was made smaller.

// Tables of this file, beside those in keys.go:
//
//	P host 0 vm    empty: the VM takes room on the host
//	G group 0 vm   empty: the same, by its group
//	Q vm           empty: the VM is in a step of the queue, or waits for its turn
const (
	tOnHost   = 'P'
	tInGroup  = 'G'
	tUnderway = 'Q'
)

// The steps of a VM's way to a host (pb.VMQueue.step).
const (
	StepQueued   = "queued"   // waits for a host
	StepStarting = "starting" // its host is to start it
	StepEvicting = "evicting" // its host is to stop it
)

// The steps of a live migration from A to B. Which of the two machines may run is
// said by these alone, and every change of them is compare-and-set:
//
//	            host  next  A's machine               B's machine
//	migrating   A     B     runs, sends its memory    takes it, never runs
//	switched    B     A     never runs                never runs
//	landed      B     A     is ended                  is to run
//	returning   A     B     is to run again           is ended
//
// migrating → switched is one entry with the hand-over of all the VM's volumes.
// From switched A alone says how it goes on, for only A's machine could run again:
// landed once that can be excluded, else returning.
const (
	StepMigrating = "migrating"
	StepSwitched  = "switched"
	StepLanded    = "landed"
	StepReturning = "returning"
)

// SecondHost is the host beside vm.Host that may have a machine of a VM, and keeps
// its room; "" if there is none.
func SecondHost(vm *pb.VM) string {
	switch vm.GetQueue().GetStep() {
	case StepMigrating, StepSwitched:
		return vm.Queue.NextHost
	}
	return ""
}

// HasMachine reports whether a machine of a VM may be on a host.
func HasMachine(vm *pb.VM, host string) bool {
	return host != "" && (vm.GetHost() == host || SecondHost(vm) == host)
}

// InMotion reports whether a VM is in a step of a live migration.
func InMotion(vm *pb.VM) bool {
	switch vm.GetQueue().GetStep() {
	case StepMigrating, StepSwitched, StepLanded, StepReturning:
		return true
	}
	return false
}

// Resources are thousandths of a processor, bytes of memory, bytes of local
// disk, and bytes a second of disk traffic.
type Resources [4]uint64

var resourceNames = [4]string{"thousandths of a processor", "bytes of memory", "bytes of disk", "bytes a second of disk traffic"}

// Capacity returns what a host has for VMs.
func Capacity(h *pb.Host) Resources {
	return Resources{uint64(h.GetCpus()) * 1000, h.GetMemoryBytes(), h.GetPromise().GetDiskBytes(), h.GetPromise().GetBandwidthBytes()}
}

// Percents returns how much of each resource may be promised, in per cent.
func Percents(h *pb.Host) (out [4]uint32) {
	p := h.GetPromise()
	for i, v := range []uint32{p.GetCpuPercent(), p.GetMemoryPercent(), p.GetDiskPercent(), p.GetBandwidthPercent()} {
		if out[i] = v; v == 0 {
			out[i] = 100
		}
	}
	return out
}

// Limit is what may be promised: capacity × per cent.
func Limit(h *pb.Host) (out Resources) {
	pct := Percents(h)
	for i, c := range Capacity(h) {
		out[i] = c/100*uint64(pct[i]) + c%100*uint64(pct[i])/100
	}
	return out
}

// Need is what a VM asks for, wherever it is.
func Need(vm *pb.VM) Resources {
	return Resources{uint64(vm.GetCpus()) * 1000, vm.GetMemoryBytes(), vm.GetNeeds().GetDiskBytes(), vm.GetNeeds().GetBandwidthBytes()}
}

// Takes is what a VM takes of its host now: nothing when it is stopped, and
// neither processors nor disk traffic while it waits for its turn.
func Takes(vm *pb.VM) Resources {
	n := Need(vm)
	switch {
	case !bound(vm):
		return Resources{}
	case vm.GetQueue().GetSliced():
		n[0], n[3] = 0, 0
	}
	return n
}

func bound(vm *pb.VM) bool { return vm.GetHost() != "" && vm.GetDesired() != "stopped" }

// VMsOn returns the VMs that take room on a host.
func VMsOn(kv KV, host string) []*pb.VM { return indexed(kv, key(tOnHost, host, "\x00")) }

// VMsUnderway returns the VMs that are queued, starting, evicting or wait for
// their turn.
func VMsUnderway(kv KV) []*pb.VM { return indexed(kv, key(tUnderway)) }

func indexed(kv KV, prefix []byte) (out []*pb.VM) {
	var names []string
	kv.Scan(prefix, nil, func(k, _ []byte) bool {
		names = append(names, string(k[len(prefix):]))
		return true
	})
	for _, n := range names {
		if vm := VMByName(kv, n); vm != nil {
			out = append(out, vm)
		}
	}
	return out
}

// storeVM writes a VM, raises its revision and keeps the indexes.
func (a *apply) storeVM(old, vm *pb.VM) {
	a.unindexVM(old)
	vm.Revision = old.GetRevision() + 1
	put(a.kv, key(tVM, vm.Name), vm)
	if vm.GetQueue().GetStep() != "" || vm.GetQueue().GetSliced() {
		a.kv.Set(key(tUnderway, vm.Name), []byte{})
	}
	if !bound(vm) {
		return
	}
	a.kv.Set(key(tOnHost, vm.Host, "\x00", vm.Name), []byte{})
	if h := SecondHost(vm); h != "" {
		a.kv.Set(key(tOnHost, h, "\x00", vm.Name), []byte{})
	}
	if g := vm.GetNeeds().GetGroup(); g != "" {
		a.kv.Set(key(tInGroup, g, "\x00", vm.Name), []byte{})
	}
}

func (a *apply) unindexVM(old *pb.VM) {
	if old == nil {
		return
	}
	a.kv.Delete(key(tUnderway, old.Name))
	if !bound(old) {
		return
	}
	a.kv.Delete(key(tOnHost, old.Host, "\x00", old.Name))
	if h := SecondHost(old); h != "" {
		a.kv.Delete(key(tOnHost, h, "\x00", old.Name))
	}
	if g := old.GetNeeds().GetGroup(); g != "" {
		a.kv.Delete(key(tInGroup, g, "\x00", old.Name))
	}
}

// checkVM refuses a definition nothing could place.
func checkVM(vm *pb.VM) error {
	n := vm.GetNeeds()
	texts := []string{n.GetGroup(), n.GetNear(), n.GetApart(), n.GetDomain(), n.GetTenant()}
	for k, v := range n.GetLabels() {
		texts = append(texts, k, v)
	}
	for _, s := range append(texts, n.GetNetworks()...) {
		if len(s) > maxNameBytes || slices.Contains([]byte(s), 0) {
			return status.Errorf(status.Invalid, "VM %s has %q among its labels, groups or networks: at most %d bytes, without zero bytes", vm.Name, s, maxNameBytes)
		}
	}
	if n.GetDurationMs() < 0 {
		return status.Errorf(status.Invalid, "VM %s cannot run for %d ms: 0 means for an unknown time", vm.Name, n.GetDurationMs())
	}
	return nil
}

// checkRoom refuses what the VM's hosts cannot take: it is asked when the VM
// comes to a host, and when it comes to take more there.
func (a *apply) checkRoom(old, vm *pb.VM) error {
	if !bound(vm) {
		return nil
	}
	if err := a.checkRoomOn(old, vm, vm.Host); err != nil {
		return err
	}
	if second := SecondHost(vm); second != "" {
		return a.checkRoomOn(old, vm, second)
	}
	return nil
}

func (a *apply) checkRoomOn(old, vm *pb.VM, host string) error {
	takes, had := Takes(vm), Resources{}
	stays := bound(old) && HasMachine(old, host)
	if stays {
		had = Takes(old)
	}
	h := HostByName(a.kv, host)
	if h == nil {
		if stays {
			return nil // the host was removed under it: stopping it must work
		}
		return status.Errorf(status.NotFound, "there is no host %q for VM %s: `cairn host ls` lists them", host, vm.Name)
	}
	if !stays {
		if why := a.unfit(vm, h); why != "" {
			return status.Errorf(status.Conflict, "VM %s cannot go to host %s: it %s", vm.Name, h.Name, why)
		}
	}
	return a.room(vm, h, takes, had)
}

// room sums up what a host's VMs take.
func (a *apply) room(vm *pb.VM, h *pb.Host, takes, had Resources) error {
	more := false
	for i := range takes {
		more = more || takes[i] > had[i]
	}
	if !more {
		return nil
	}
	var used Resources
	for _, other := range VMsOn(a.kv, h.Name) {
		if other.Name == vm.Name {
			continue
		}
		for i, n := range Takes(other) {
			used[i] += n
		}
	}
	for i, limit := range Limit(h) {
		if free := limit - min(limit, used[i]); takes[i] > free && takes[i] > had[i] {
			return status.Errorf(status.NoSpace, "host %s has %d of %d %s free and VM %s asks for %d: stop a VM there, or choose another host",
				h.Name, free, limit, resourceNames[i], vm.Name, takes[i])
		}
	}
	return nil
}

// unfit says what but room keeps a VM from a host; "" if nothing does.
func (a *apply) unfit(vm *pb.VM, h *pb.Host) string {
	n := vm.GetNeeds()
	if h.Drained {
		return "is drained"
	}
	for _, l := range sortedKeys(n.GetLabels()) {
		if got := hostLabel(h, l); got != n.Labels[l] {
			return fmt.Sprintf("has %s=%q and not %q", l, got, n.Labels[l])
		}
	}
	for _, net := range n.GetNetworks() {
		if !slices.Contains(h.GetPromise().GetNetworks(), net) {
			return "does not reach storage network " + net
		}
	}
	at := Label(h, n.GetDomain())
	if n.GetApart() != "" && a.inGroup(vm, n.Apart, at) {
		return fmt.Sprintf("is in %s, where a VM of group %s is, which this one must stay apart from", at, n.Apart)
	}
	if n.GetNear() != "" && a.inGroup(vm, n.Near, "") && !a.inGroup(vm, n.Near, at) {
		return fmt.Sprintf("is in %s, where no VM of group %s is, which this one must be near", at, n.Near)
	}
	return ""
}

func hostLabel(h *pb.Host, l string) string {
	if l == "host" {
		return h.Name
	}
	return h.Labels[l]
}

func sortedKeys(m map[string]string) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// inGroup reports whether another VM of a group is in a domain; "" is anywhere.
func (a *apply) inGroup(vm *pb.VM, group, at string) bool {
	for _, o := range indexed(a.kv, key(tInGroup, group, "\x00")) {
		if o.Name != vm.Name && (at == "" || Label(HostByName(a.kv, o.Host), vm.GetNeeds().GetDomain()) == at) {
			return true
		}
	}
	return false
}

// bindVM implements BindVM.
func (a *apply) bindVM(op *pb.BindVM) (*pb.Result, error) { return a.bind(op, false) }

// bind is bindVM; handed says that the VM's volumes go with it.
func (a *apply) bind(op *pb.BindVM, handed bool) (*pb.Result, error) {
	old := VMByName(a.kv, op.Vm)
	if old == nil {
		return nil, status.Errorf(status.NotFound, "there is no VM %s: create it first", op.Vm)
	}
	if old.Revision != op.Revision {
		return nil, status.Errorf(status.Conflict, "VM %s was changed meanwhile (revision %d, not %d): read it again", old.Name, old.Revision, op.Revision)
	}
	vm := proto.Clone(old).(*pb.VM)
	vm.Host, vm.Desired, vm.Queue = op.Host, op.Desired, proto.Clone(op.Queue).(*pb.VMQueue)
	if err := checkStep(vm); err != nil {
		return nil, err
	}
	if err := checkMotion(old, vm, handed); err != nil {
		return nil, err
	}
	if err := a.checkRoom(old, vm); err != nil {
		return nil, err
	}
	if q := vm.Queue; q.GetStep() == StepQueued && q.SinceUnixNs == 0 {
		q.SinceUnixNs = a.now
	}
	a.storeVM(old, vm)
	if old.Desired != vm.Desired || old.Host != vm.Host || old.GetQueue().GetStep() != vm.GetQueue().GetStep() {
		a.event("VM %s: %s", vm.Name, describe(vm))
	}
	return &pb.Result{Vm: vm}, nil
}

// checkStep refuses what makes no sense together.
func checkStep(vm *pb.VM) error {
	switch vm.Desired {
	case "running", "stopped", "paused":
	default:
		return status.Errorf(status.Invalid, "VM %s cannot be made %q: running, stopped or paused", vm.Name, vm.Desired)
	}
	q := vm.GetQueue()
	ok := false
	switch q.GetStep() {
	case "":
		ok = vm.Host != "" || vm.Desired == "stopped"
	case StepQueued:
		ok = vm.Host == "" && vm.Desired == "running"
	case StepStarting, StepEvicting:
		ok = vm.Host != "" && vm.Desired == "running"
	case StepMigrating, StepSwitched, StepLanded, StepReturning:
		ok = vm.Host != "" && q.NextHost != "" && q.NextHost != vm.Host && vm.Desired == "running" && !q.Sliced
	}
	if !ok || len(q.GetReason()) > maxTextBytes || q.GetSliced() && !vm.GetNeeds().GetBatch() {
		return status.Errorf(status.Invalid, "VM %s cannot be %s on host %q in step %q (sliced: %v): this is a fault of the caller", vm.Name, vm.Desired, vm.Host, q.GetStep(), q.GetSliced())
	}
	return nil
}

// checkMotion keeps the order of a migration's steps. A VM that is switched runs
// nowhere until it has landed or returned; what else may happen to it is that it
// is given up: stopped, or put into the queue because its host is gone.
func checkMotion(old, vm *pb.VM, handed bool) error {
	was, is := old.GetQueue().GetStep(), vm.GetQueue().GetStep()
	next := vm.GetQueue().GetNextHost()
	stays := vm.Host == old.GetHost() && next == old.GetQueue().GetNextHost()
	swapped := vm.Host == old.GetQueue().GetNextHost() && next == old.GetHost()
	ok := true
	switch {
	case is == StepSwitched && handed:
		ok = was == StepMigrating && swapped
	case is == was && stays:
	case is == StepMigrating:
		ok = (was == "" || was == StepEvicting) && bound(old) && vm.Host == old.Host
	case is == StepSwitched:
		ok = false
	case is == StepReturning:
		ok = was == StepSwitched && swapped
	case is == StepLanded:
		ok = was == StepSwitched && stays
	default:
		ok = was != StepSwitched || vm.Host == ""
	}
	if !ok {
		return status.Errorf(status.Conflict, "VM %s is %s on host %q and cannot become %s on host %q: it moves; read it again", vm.Name, stepName(was), old.GetHost(), stepName(is), vm.Host)
	}
	return nil
}

func stepName(step string) string {
	if step == "" {
		return "settled"
	}
	return step
}

// describe is an event's text.
func describe(vm *pb.VM) string {
	q := vm.GetQueue()
	text := fmt.Sprintf("%s on host %q", vm.Desired, vm.Host)
	switch q.GetStep() {
	case StepQueued:
		text = "waits for a host"
	case StepStarting:
		text = "goes to host " + vm.Host
	case StepEvicting:
		text = "leaves host " + vm.Host
	case StepMigrating:
		text = fmt.Sprintf("migrates from host %s to host %s", vm.Host, q.NextHost)
	case StepSwitched:
		text = fmt.Sprintf("is switched from host %s to host %s", q.NextHost, vm.Host)
	case StepLanded:
		text = fmt.Sprintf("goes on on host %s, where it has come from host %s", vm.Host, q.NextHost)
	case StepReturning:
		text = fmt.Sprintf("goes on on host %s, and not on host %s", vm.Host, q.NextHost)
	}
	if q.GetReason() != "" {
		text += ": " + q.Reason
	}
	return text
}

// Bounds of the policy.
const (
	maxWeights  = 1024
	maxPolicyMs = 30 * 24 * 3600 * 1000
)

// setPlacement implements SetPlacement. Names are checked where they are used:
// this floor knows no policies.
func (a *apply) setPlacement(p *pb.Placement) (*pb.Result, error) {
	if p == nil || len(p.Policy) > maxNameBytes || len(p.Order) > maxNameBytes || len(p.Weights) > maxWeights {
		return nil, status.Errorf(status.Invalid, "a placement policy has two short names and at most %d weights", maxWeights)
	}
	for t, w := range p.Weights {
		if !(w > 0 && w <= 1e6) || len(t) > maxNameBytes {
			return nil, status.Errorf(status.Invalid, "tenant %q cannot have the weight %g: above 0 and up to 1,000,000", t, w)
		}
	}
	if p.AgeMs < 0 || p.QuantumMs < 0 || min(p.DelayMs, p.RestartMs, p.CoolMs) < -1 || max(p.AgeMs, p.QuantumMs, p.DelayMs, p.RestartMs, p.CoolMs) > maxPolicyMs {
		return nil, status.Errorf(status.Invalid, "the times of a placement policy are 0 to 30 days")
	}
	if p.CoolPercent > 99 {
		return nil, status.Errorf(status.Invalid, "chunks cannot be cooled above %d %%: 1 to 99 %% are possible", p.CoolPercent)
	}
	switch p.Rebalance {
	case "", "off", "data", "all":
	default:
		return nil, status.Errorf(status.Invalid, "rebalancing cannot be %q: off, data or all", p.Rebalance)
	}
	put(a.kv, key(tMeta, "placement"), p)
	a.event("placement policy %q, queue order %q", p.Policy, p.Order)
	return &pb.Result{}, nil
}

// PlacementOf returns the cluster's policy, empty when none was set.
func PlacementOf(kv KV) *pb.Placement {
	p := &pb.Placement{}
	load(kv, key(tMeta, "placement"), p)
	return p
}
