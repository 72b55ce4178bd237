// Package agent runs the virtual machines of one host.
//
// Duty: attach a machine's volumes, start it, stop it, pause it, show it, let
// a running guest see that a volume has grown, adopt the machines that kept
// running while the host process was away, and report the ones that ended.
// Floor: F4. It decides neither which machines are to run nor where
// (placement), and it keeps nothing on disk but what vmhook/machine does.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sort"
	"sync"
	"time"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/vmhook/kvm"
	"github.com/cairnstore/cairn/vmhook/machine"
)

// machinesMax bounds the machines of one host.
const machinesMax = 1024

// detachTimeout bounds the detaching of one volume after its machine's end.
const detachTimeout = 30 * time.Second

// Volumes is the host's gateway, as an agent needs it.
type Volumes interface {
	// Attach makes a volume available on this host and returns its NBD URI,
	// the same one after a restart of the host process. Attaching what is
	// attached here already is fine.
	Attach(ctx context.Context, name string) (uri string, err error)
	// Detach gives a volume back; status.NotFound if it is not attached here.
	Detach(ctx context.Context, name string) error
	// Expect returns the URI at which a volume of sizeBytes can be opened that host
	// from has attached and is to hand over; Detach ends that too.
	Expect(name, from string, sizeBytes uint64) (uri string)
	// TakeBack attaches a volume whoever has it.
	TakeBack(ctx context.Context, name string) error
}

// Config is what an agent works with.
type Config struct {
	Dir     string // the machines' files
	Volumes Volumes
	Log     *slog.Logger // nil: slog.Default()
	// OnExit is called, from a goroutine of its own, when a machine has ended
	// for any reason and its volumes are detached. It must not call the agent's
	// Close. May be nil.
	OnExit func(vm, why string)
	Accel  machine.Accel // zero: probe /dev/kvm once
	QEMU   string        // program; "": qemu-system-x86_64

	// For live migrations; nil: none. Listen opens ports of the storage network for
	// one machine's memory and says how others reach them; Dial reaches them.
	Listen func() (ls []net.Listener, addr string, err error)
	Dial   func(ctx context.Context, addr string) (net.Conn, error)
}

// Agent is the keeper of one host's machines. All methods may be called at any
// time by many goroutines; those on one machine wait for each other.
type Agent struct {
	cfg Config
	wg  sync.WaitGroup
	ctx context.Context // ends with Close
	end context.CancelFunc

	accelOnce sync.Once
	accel     machine.Accel

	mu     sync.Mutex
	vms    map[string]*vm // running, starting or just ended; ≤ machinesMax
	closed bool
}

// vm is one machine of the agent.
type vm struct {
	name    string
	volumes []string // by disk

	m    *machine.Machine // set once, before started is closed; nil if the start failed
	gone chan struct{}    // closed when it has ended and its volumes are detached
	// started is closed when m is set or the start has failed.
	started chan struct{}
	err     error // what went wrong after the end; set before gone is closed

	attaching sync.Mutex // guards detached, and keeps Attach and Detach apart
	detached  bool       // it has ended: nothing is attached for it any more
}

// New returns an agent without machines; Adopt finds those that run.
func New(cfg Config) *Agent {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	a := &Agent{cfg: cfg, vms: map[string]*vm{}}
	a.ctx, a.end = context.WithCancel(context.Background())
	return a
}

// Start attaches the machine's volumes and starts it. It returns when QEMU
// runs; the guest is then booting. After a failure the volumes are detached.
func (a *Agent) Start(ctx context.Context, v *pb.VM) error {
	// A machine that waits for memory that will not come is in nobody's way.
	if err := a.Abandon(ctx, v.GetName()); err != nil && !errors.Is(err, status.NotFound) && !errors.Is(err, status.Conflict) {
		return err
	}
	e, err := a.reserve(v)
	if err != nil {
		return err
	}
	m, err := a.start(ctx, v, e)
	if err != nil {
		a.drop(e, nil)
		a.wg.Done()
		return err
	}
	a.watch(e, m)
	return nil
}

// volumesOf lists a machine's volumes in the order of its disks.
func volumesOf(v *pb.VM) []string {
	var out []string
	if v.GetVolume() != "" {
		out = append(out, v.GetVolume())
	}
	return append(out, v.GetDisks()...)
}

// reserve enters a machine that is about to start, and counts it in a.wg:
// watch, or the caller if it never gets there, counts it out.
func (a *Agent) reserve(v *pb.VM) (*vm, error) {
	e := &vm{name: v.GetName(), volumes: volumesOf(v), gone: make(chan struct{}), started: make(chan struct{})}
	seen := map[string]bool{}
	for _, name := range e.volumes {
		if seen[name] {
			return nil, status.Errorf(status.Invalid, "VM %s has volume %s twice", e.name, name)
		}
		seen[name] = true
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return nil, status.Errorf(status.Shutdown, "the host is shutting down")
	}
	if a.vms[e.name] != nil {
		return nil, status.Errorf(status.Exists, "VM %s is running already", e.name)
	}
	if len(a.vms) >= machinesMax {
		return nil, status.Errorf(status.TooBig, "VM %s: the host runs %d VMs, which is the limit", e.name, machinesMax)
	}
	for _, other := range a.vms {
		for _, name := range other.volumes {
			if seen[name] {
				return nil, status.Errorf(status.Held, "VM %s: volume %s is in use by VM %s", e.name, name, other.name)
			}
		}
	}
	a.vms[e.name] = e
	a.wg.Add(1)
	return e, nil
}

// start is Start after the reservation.
func (a *Agent) start(ctx context.Context, v *pb.VM, e *vm) (*machine.Machine, error) {
	spec := a.spec(ctx, v)
	attached := 0
	fail := func(err error) (*machine.Machine, error) {
		return nil, errors.Join(err, a.detach(e.volumes[:attached]))
	}
	for _, name := range e.volumes {
		uri, err := a.cfg.Volumes.Attach(ctx, name)
		if err != nil {
			return fail(fmt.Errorf("VM %s: attach volume %s: %w", e.name, name, err))
		}
		attached++
		spec.Disks = append(spec.Disks, machine.Disk{Name: name, URI: uri, Serial: serial(name)})
	}
	m, err := machine.Start(ctx, spec)
	if err != nil {
		return fail(err)
	}
	return m, nil
}

// spec is a machine without its disks.
func (a *Agent) spec(ctx context.Context, v *pb.VM) machine.Spec {
	return machine.Spec{
		Name: v.GetName(), CPUs: int(v.GetCpus()), MemoryBytes: v.GetMemoryBytes(),
		Kernel: v.GetKernel(), Initrd: v.GetInitrd(), Append: v.GetAppend(),
		Dir: a.cfg.Dir, QEMU: a.cfg.QEMU, Paused: v.GetDesired() == "paused", Accel: a.accelerator(ctx),
	}
}

// serial is the beginning of a volume's name: virtio has 20 bytes for it.
func serial(name string) string {
	if len(name) > 20 {
		return name[:20]
	}
	return name
}

// accelerator probes once: what /dev/kvm can do does not change.
func (a *Agent) accelerator(ctx context.Context) machine.Accel {
	if a.cfg.Accel.Name != "" {
		return a.cfg.Accel
	}
	a.accelOnce.Do(func() {
		a.accel = machine.Choose(kvm.Probe(context.WithoutCancel(ctx)))
	})
	return a.accel
}

// watch makes a machine the agent's, until it ends.
func (a *Agent) watch(e *vm, m *machine.Machine) {
	e.m = m
	close(e.started)
	go func() {
		defer a.wg.Done()
		select {
		case <-m.Done():
		case <-a.ctx.Done():
			m.Release()
			a.drop(e, status.Errorf(status.Shutdown, "VM %s: the host is shutting down; the VM goes on", e.name))
			return
		}
		why := m.Exit()
		e.attaching.Lock()
		e.detached = true
		err := errors.Join(a.detach(e.volumes), m.Forget())
		e.attaching.Unlock()
		m.Release()
		a.drop(e, err)
		a.report(e.name, why, err)
	}()
}

// drop takes a machine out of the table and wakes who waits for that.
func (a *Agent) drop(e *vm, err error) {
	a.mu.Lock()
	delete(a.vms, e.name)
	a.mu.Unlock()
	e.err = err
	if e.m == nil {
		close(e.started)
	}
	close(e.gone)
}

func (a *Agent) report(name, why string, err error) {
	if err != nil {
		a.cfg.Log.Error("a VM ended and left something behind", "vm", name, "why", why, "err", err)
	} else {
		a.cfg.Log.Info("a VM ended", "vm", name, "why", why)
	}
	if a.cfg.OnExit != nil {
		a.cfg.OnExit(name, why)
	}
}

// detach gives volumes back, all of them whatever happens to one.
func (a *Agent) detach(volumes []string) error {
	var failed error
	for _, name := range volumes {
		ctx, cancel := context.WithTimeout(context.Background(), detachTimeout)
		err := a.cfg.Volumes.Detach(ctx, name)
		cancel()
		if err != nil && !errors.Is(err, status.NotFound) {
			failed = errors.Join(failed, fmt.Errorf("detach volume %s: %w", name, err))
		}
	}
	return failed
}

// find returns a running machine, waiting for one that is starting.
func (a *Agent) find(ctx context.Context, name string) (*vm, error) {
	a.mu.Lock()
	e := a.vms[name]
	a.mu.Unlock()
	if e != nil {
		select {
		case <-e.started:
		case <-ctx.Done():
			return nil, status.Errorf(status.Timeout, "VM %s is still starting: %w", name, ctx.Err())
		}
	}
	if e == nil || e.m == nil {
		return nil, status.Errorf(status.NotFound, "VM %s is not running on this host", name)
	}
	return e, nil
}

// Stop ends a machine (see machine.Stop for force and ctx) and returns when
// its volumes are detached.
func (a *Agent) Stop(ctx context.Context, name string, force bool) error {
	e, err := a.find(ctx, name)
	if err != nil {
		return err
	}
	if !force && e.m.Arriving() {
		return status.Errorf(status.Conflict, "VM %s is arriving from another host: ask again when it has", name)
	}
	if err := e.m.Stop(ctx, force); err != nil {
		return err
	}
	<-e.gone
	return e.err
}

// Pause stops the guest's CPUs; Resume lets it go on.
func (a *Agent) Pause(ctx context.Context, name string) error {
	e, err := a.find(ctx, name)
	if err != nil {
		return err
	}
	return e.m.Pause(ctx)
}

// Resume lets a paused guest go on.
func (a *Agent) Resume(ctx context.Context, name string) error {
	e, err := a.find(ctx, name)
	if err != nil {
		return err
	}
	return e.m.Resume(ctx)
}

// Show returns what a machine is doing.
func (a *Agent) Show(ctx context.Context, name string) (machine.Status, error) {
	e, err := a.find(ctx, name)
	if err != nil {
		return machine.Status{}, err
	}
	return e.m.Status(), nil
}

// List returns what the machines are doing, by name. One that is starting is
// not in it yet.
func (a *Agent) List() []machine.Status {
	var out []machine.Status
	for _, e := range a.running() {
		out = append(out, e.m.Status())
	}
	return out
}

// running returns the machines that have started, by name.
func (a *Agent) running() []*vm {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []*vm
	for _, e := range a.vms {
		select {
		case <-e.started:
			if e.m != nil {
				out = append(out, e)
			}
		default:
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].name < out[j].name })
	return out
}

// Refresh lets the running guest that uses a volume see its size, which the
// volume's NBD export must have already. A volume nobody uses is fine.
func (a *Agent) Refresh(ctx context.Context, volume string, sizeBytes uint64) error {
	var failed error
	for _, e := range a.running() {
		for disk, name := range e.volumes {
			if name != volume {
				continue
			}
			if err := e.m.Grow(ctx, disk, sizeBytes); err != nil {
				failed = errors.Join(failed, err)
			}
		}
	}
	return failed
}

// StopAll ends every machine of this host, and returns when all are gone.
func (a *Agent) StopAll(ctx context.Context, force bool) error {
	var wg sync.WaitGroup
	vms := a.running()
	errs := make([]error, len(vms))
	for i, e := range vms {
		wg.Go(func() { errs[i] = a.Stop(ctx, e.name, force) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Close ends the agent and leaves the machines running, for the next one to
// adopt.
func (a *Agent) Close() {
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	a.end()
	a.wg.Wait()
}
