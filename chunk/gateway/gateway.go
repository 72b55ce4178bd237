// Package gateway is the shell around the volume engine: the single fenced
// writer of every volume attached on this host.
//
// Duty: attach and detach, one lock around each engine's Step, the links to
// the replicas, the calls to the metadata service, lease renewal, and the
// exports that the NBD server offers. Floor: F4. It takes no protocol decision
// (chunk/volume does), parses no NBD and opens no store.
//
// # Who runs what
//
//	Submit, Replies, …   the caller's goroutine: lock, Step, unlock, carry out
//	link worker          one per volume: opens and closes links     (links.go)
//	metadata call        one goroutine per call in flight: ≤ 2 per volume
//	renewal, ticks       one goroutine each per gateway            (lease.go)
package gateway

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"sort"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/chunk/client"
	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/netplane/link"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// Meta is what a gateway needs of the metadata service (meta/client).
type Meta interface {
	Do(ctx context.Context, cmd *pb.Command) (*pb.Result, error)
	Query(ctx context.Context, q *pb.QueryRequest) (*pb.QueryReply, error)
	Renew(ctx context.Context, r *pb.RenewRequest) (*pb.RenewReply, error)
}

// Config says who a gateway is and what it stands on.
type Config struct {
	Host    string // this host's name in metadata
	Cluster string // the cluster's identity, checked by every chunk server
	Meta    Meta
	Dialer  link.Dialer                      // to the other hosts' chunk servers
	Local   map[ids.StoreID]client.Submitter // the stores of this process
	Usage   func() []*pb.StoreUsage          // for the heartbeat; may be nil
	Say     func(*pb.RenewRequest)           // adds to a heartbeat what others of this host have to say; must not wait; may be nil
	Heard   func(*pb.RenewReply)             // an answer to a heartbeat; must not wait; may be nil
	Gone    func(name string)                // an export ended: its connections are to be closed; may be nil
	Resized func(name string, size uint64)   // a volume has grown; may be nil
	Stall   time.Duration                    // see volume.Config
	Grace   time.Duration                    // see volume.Config
	Copies  int64                            // bytes per second that all background copies may use; 0: 1 GiB
	Renew   time.Duration                    // between renewals; 0: 2 s
	Alone   bool                             // proof that this host's earlier gateway process is dead
	Log     *slog.Logger                     // nil: slog.Default
}

// openWait bounds how long a client's open of a volume waits for the gateway's
// recovery after a restart; less than the handshake's deadline, so that the
// client hears why.
const openWait = 8 * time.Second

// Gateway holds the volumes attached on one host.
type Gateway struct {
	cfg     Config
	session string // random: tells this process from its predecessors
	log     *slog.Logger
	members *memberBatch
	budget  *copyBudget
	kick    chan struct{} // renew now
	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup

	heatTold time.Duration // renewLoop's: the last report

	mu        sync.Mutex // guards the fields below
	volumes   map[string]*Volume
	expected  map[string]*arrival         // that other hosts' gateways are to hand over
	shown     map[string]*Volume          // snapshots that are looked at, by VOLUME@SNAPSHOT; ≤ maxShown
	care      map[string]*Volume          // under repair, not exported; nil: being attached
	wishes    map[uint64]*pb.VolumeWishes // by volume: the last answer's, for sessions that begin
	attaching map[string]chan struct{}    // closed when the running attach of that name is over
	recovered chan struct{}               // closed when the predecessor's volumes are attached again
	closed    bool
}

// New starts a gateway without volumes.
func New(cfg Config) *Gateway {
	if cfg.Renew == 0 {
		cfg.Renew = 2 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails
	g := &Gateway{cfg: cfg, session: hex.EncodeToString(id[:]), log: cfg.Log, kick: make(chan struct{}, 1),
		volumes: map[string]*Volume{}, expected: map[string]*arrival{}, care: map[string]*Volume{}, shown: map[string]*Volume{}, attaching: map[string]chan struct{}{}, recovered: make(chan struct{})}
	g.ctx, g.cancel = context.WithCancel(context.Background())
	if cfg.Copies == 0 {
		cfg.Copies = defaultCopyBudget
	}
	g.budget = &copyBudget{perSecond: float64(cfg.Copies)}
	g.members = newMemberBatch(g.ctx, cfg.Meta)
	g.wg.Add(2)
	go g.renewLoop()
	go g.tickLoop()
	return g
}

// now is the engines' clock: it also counts suspension.
func now() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(fmt.Sprintf("gateway: CLOCK_BOOTTIME: %v", err)) // every Linux since 2.6.39 has it
	}
	return time.Duration(ts.Nano())
}

// Recover attaches again what this host held when its last gateway process
// ended. Until it has returned, opens wait.
func (g *Gateway) Recover(ctx context.Context) error {
	defer close(g.recovered)
	rep, err := g.cfg.Meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Volumes{Volumes: true}})
	if err != nil {
		return fmt.Errorf("cannot ask which volumes this host held: %w", err)
	}
	var wg sync.WaitGroup
	for _, v := range rep.Volumes {
		if v.HolderHost != g.cfg.Host || v.HolderSession == "" || v.Maintenance {
			continue
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			if _, err := g.Attach(ctx, v.Name, false); err != nil {
				g.log.Error("volume not attached again", "volume", v.Name, "err", err)
			}
		}()
	}
	wg.Wait()
	return nil
}

// Attach makes this gateway the writer of a volume and returns it; the volume
// may still be sealing and reconciling, its operations wait until it serves.
// A volume attached here already is returned as it is. Held elsewhere:
// status.Held, unless takeover.
func (g *Gateway) Attach(ctx context.Context, name string, takeover bool) (*Volume, error) {
	for {
		g.mu.Lock()
		if g.closed {
			g.mu.Unlock()
			return nil, status.Errorf(status.Shutdown, "host %s is going away: attach volume %s on another host", g.cfg.Host, name)
		}
		if v := g.volumes[name]; v != nil && v.State() != volume.Ended {
			g.mu.Unlock()
			return v, nil
		}
		busy := g.attaching[name]
		if busy == nil {
			done := make(chan struct{})
			g.attaching[name] = done
			g.mu.Unlock()
			v, err := g.attach(ctx, name, takeover)
			g.mu.Lock()
			delete(g.attaching, name)
			close(done)
			g.mu.Unlock()
			return v, err
		}
		g.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, status.Errorf(status.Timeout, "volume %s is still being attached on host %s: ask again", name, g.cfg.Host)
		}
	}
}

func (g *Gateway) attach(ctx context.Context, name string, takeover bool) (*Volume, error) {
	at := &pb.Attach{Volume: name, Host: g.cfg.Host, Session: g.session, Takeover: takeover, PredecessorGone: g.cfg.Alone}
	res, err := g.cfg.Meta.Do(ctx, &pb.Command{Op: &pb.Command_Attach{Attach: at}})
	if err != nil {
		return nil, err
	}
	if res.Volume == nil {
		return nil, status.Errorf(status.Internal, "metadata answered the attach of %s without the volume", name)
	}
	cfg := volume.Config{Chunks: res.Chunks}
	if cfg.Origins, err = g.origins(ctx, res.Volume); err != nil {
		return nil, err
	}
	v, err := newVolume(g, res.Volume, cfg, "")
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	old := g.volumes[name]
	g.volumes[name] = v
	g.mu.Unlock()
	if old != nil {
		old.close()
	}
	g.RenewNow()
	g.log.Info("volume attached", "volume", name, "epoch", res.Volume.Epoch, "members", len(res.Volume.Members))
	return v, nil
}

// Detach drains and flushes a volume and lets it go, or says within detachWait
// what is in the way; it is served on then. With force it is let go whatever
// waits. Not attached here: status.NotFound.
func (g *Gateway) Detach(ctx context.Context, name string, force bool) error {
	v, err := g.Volume(name)
	if err != nil {
		return err
	}
	if err := v.detach(ctx, force); err != nil {
		return err
	}
	g.forget(v)
	g.log.Info("volume detached", "volume", name)
	return nil
}

// forget closes a volume and takes it from the list, if it is still there.
func (g *Gateway) forget(v *Volume) {
	g.mu.Lock()
	if g.volumes[v.name] == v {
		delete(g.volumes, v.name)
	}
	g.mu.Unlock()
	v.close()
}

// Refresh makes a volume learn its size and members now.
func (g *Gateway) Refresh(ctx context.Context, name string) error {
	v, err := g.Volume(name)
	if err != nil {
		return err
	}
	return v.refresh(ctx)
}

// Changed makes a volume, if it is attached here, learn its size and members;
// ids.VolumeID 0: all of them. It is how news from a watch comes in.
func (g *Gateway) Changed(ctx context.Context, id ids.VolumeID) {
	for _, v := range g.Volumes() {
		if id != 0 && v.id != id || v.State() == volume.Ended {
			continue
		}
		before := v.Size()
		if err := v.refresh(ctx); err != nil {
			g.log.Warn("volume not read again after a change", "volume", v.name, "err", err)
			continue
		}
		if v.Size() > before && g.cfg.Resized != nil {
			g.cfg.Resized(v.name, v.Size())
		}
	}
	for _, v := range g.Shown() {
		if id == 0 || v.id == id {
			if err := v.lookAgain(ctx, nil); err != nil {
				g.log.Warn("snapshot not read again after a change", "snapshot", v.name, "err", err)
			}
		}
	}
}

// Volume returns a volume attached here, or status.NotFound.
func (g *Gateway) Volume(name string) (*Volume, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	v := g.volumes[name]
	if v == nil {
		return nil, status.Errorf(status.NotFound, "volume %q is not attached on host %s: `cairn volume attach %s` attaches it", name, g.cfg.Host, name)
	}
	return v, nil
}

// Volumes returns what is attached here, by name.
func (g *Gateway) Volumes() []*Volume {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := make([]*Volume, 0, len(g.volumes))
	for _, v := range g.volumes {
		out = append(out, v)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].name < out[j].name })
	return out
}

// Close flushes every volume, tells metadata that the leases are free and lets
// go of all links. The volumes stay held by this host: its next process
// attaches them again.
func (g *Gateway) Close(ctx context.Context) error {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	var first error
	for _, v := range g.Shown() {
		g.hide(v)
	}
	vs := g.Volumes()
	var release []*pb.Lease
	for _, v := range vs {
		if err := v.settle(ctx); err != nil && first == nil {
			first = fmt.Errorf("volume %s may have lost nothing but was not flushed: %w", v.name, err)
		}
		release = append(release, &pb.Lease{VolumeId: uint64(v.id), Epoch: uint32(v.epoch)})
	}
	for _, v := range vs {
		v.step(&volume.Fence{Why: "the host is going away"})
		v.close()
	}
	if len(release) > 0 {
		_, err := g.cfg.Meta.Renew(ctx, &pb.RenewRequest{Host: g.cfg.Host, Session: g.session, Release: release})
		if err != nil {
			g.log.Warn("leases not released: the next attach waits for them to run out", "err", err)
		}
	}
	g.cancel()
	g.wg.Wait()
	return first
}
