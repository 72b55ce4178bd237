package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	metaclient "github.com/cairnstore/cairn/meta/client"
	"github.com/cairnstore/cairn/proto/pb"
)

// The metadata service by itself: three nodes, a process each, with logs on this
// machine's disk, real TCP, and clients that keep many commands in flight.

const (
	metaClients = 16 // each with up to 8 commands in flight
	metaFlights = 8
	allocBatch  = 64 // chunks of one allocation, as a gateway gathers them
)

// MetaFigures is what RunMeta measures.
type MetaFigures struct {
	CreatesPerSecond float64 `json:"volumeCreationsPerSecond"`
	CreateCPUUs      float64 `json:"cpuUsPerCreation"` // all three nodes and the clients
	ChunksPerSecond  float64 `json:"chunkAllocationsPerSecond"`
	ChunkCPUUs       float64 `json:"cpuUsPerChunk"`
	ReadP50Ms        float64 `json:"readP50Ms"` // linearizable, 200 a second, under the load of metaMixed
	ReadP99Ms        float64 `json:"readP99Ms"`
	MixedCreates     float64 `json:"mixedCreationsPerSecond"` // what that load came to
	MixedChunks      float64 `json:"mixedAllocationsPerSecond"`
	FullReadP50Ms    float64 `json:"fullReadP50Ms"`
	FullReadP99Ms    float64 `json:"fullReadP99Ms"` // the same while as much is asked for as can be
	LeaderLossMs     float64 `json:"leaderLossMs"`  // from its kill -9 to the next command's answer; heartbeats of 1 s
}

// metaTrio is three nodes of this machine.
type metaTrio struct {
	peers [3]metaPeer
	nodes [3]*program
}

type metaPeer struct{ id, raft, api string }

// metaConfigText is the file of one node: its name and directory, then every peer.
func (m *metaTrio) config(i int, dir string) string {
	var b strings.Builder
	p := m.peers[i]
	fmt.Fprintf(&b, "id = %q\ncluster = \"bench\"\ndir = %q\nraft = %q\napi = %q\ntimeout_ms = 1000\n", p.id, filepath.Join(dir, p.id), p.raft, p.api)
	for _, p := range m.peers {
		fmt.Fprintf(&b, "[[peer]]\nid = %q\nraft = %q\napi = %q\n", p.id, p.raft, p.api)
	}
	return b.String()
}

func startMetaTrio(ctx context.Context, bin, dir string) (m *metaTrio, err error) {
	m = &metaTrio{}
	for i := range m.peers {
		var addr [2]string
		for k := range addr {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return m, err
			}
			addr[k] = l.Addr().String()
			if err := l.Close(); err != nil {
				return m, err
			}
		}
		m.peers[i] = metaPeer{fmt.Sprintf("meta-%d", i+1), addr[0], addr[1]}
	}
	for i, p := range m.peers {
		file := filepath.Join(dir, p.id+".toml")
		if err := os.WriteFile(file, []byte(m.config(i, dir)), 0o600); err != nil {
			return m, err
		}
		if m.nodes[i], err = startProgram(ctx, p.id, "tcp", p.api, bin, "meta", "run", "--config", file); err != nil {
			return m, err
		}
	}
	return m, nil
}

func (m *metaTrio) close() (err error) {
	for _, n := range m.nodes {
		if n != nil {
			err = errors.Join(err, n.close())
		}
	}
	return err
}

// cpuTime is the processor time that nodes and clients have used so far.
func (m *metaTrio) cpuTime() (time.Duration, error) {
	pids := []int{os.Getpid()}
	for _, n := range m.nodes {
		pids = append(pids, n.cmd.Process.Pid)
	}
	return cpuOf(pids)
}

func (m *metaTrio) client() *metaclient.Client {
	return metaclient.New(metaclient.Config{Who: "bench", Addrs: m.apis()})
}

func (m *metaTrio) apis() (out []string) {
	for _, p := range m.peers {
		out = append(out, p.api)
	}
	return out
}

// RunMeta measures and prints.
func RunMeta(ctx context.Context, cfg Config) (err error) {
	dir, err := os.MkdirTemp(cfg.Dir, "cairn-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	m, err := startMetaTrio(ctx, cfg.Bin, dir)
	defer func() { err = errors.Join(err, m.close()) }()
	if err != nil {
		return err
	}
	b := &metaBench{m: m, bin: cfg.Bin, each: cfg.Each}
	for range metaClients {
		c := m.client()
		b.clients = append(b.clients, c)
		defer func() { err = errors.Join(err, c.Close()) }()
	}
	f, err := b.run(ctx)
	if err != nil {
		return err
	}
	return printMeta(cfg, f)
}

type metaBench struct {
	m       *metaTrio
	bin     string
	each    time.Duration
	clients []*metaclient.Client
	made    atomic.Int64
	vols    []*pb.Volume // one per worker
	next    []uint32     // the chunk each allocates next

	mu    sync.Mutex // guards reads
	reads []time.Duration
}

func (b *metaBench) run(ctx context.Context) (f *MetaFigures, err error) {
	f = &MetaFigures{}
	if err := b.hosts(ctx); err != nil {
		return nil, err
	}
	if err := b.attach(ctx); err != nil {
		return nil, err
	}
	var creates, chunks atomic.Int64
	_, _, err = b.load(ctx, func(ctx context.Context, c *metaclient.Client, worker int) (int, error) {
		return b.mixed(ctx, c, worker, &creates, &chunks)
	})
	if err != nil {
		return nil, err
	}
	f.MixedCreates, f.MixedChunks = float64(creates.Load())/b.each.Seconds(), float64(chunks.Load())/b.each.Seconds()
	f.ReadP50Ms, f.ReadP99Ms = b.latencies()
	n, cpu, err := b.load(ctx, b.create)
	if err != nil {
		return nil, err
	}
	f.CreatesPerSecond, f.CreateCPUUs = float64(n)/b.each.Seconds(), float64(cpu.Microseconds())/float64(max(1, n))
	n, cpu, err = b.load(ctx, b.allocate)
	if err != nil {
		return nil, err
	}
	f.ChunksPerSecond, f.ChunkCPUUs = float64(n)/b.each.Seconds(), float64(cpu.Microseconds())/float64(max(1, n))
	f.FullReadP50Ms, f.FullReadP99Ms = b.latencies()
	f.LeaderLossMs, err = b.leaderLoss(ctx)
	return f, err
}

// create makes one more volume.
func (b *metaBench) create(ctx context.Context, c *metaclient.Client, _ int) (int, error) {
	name := fmt.Sprintf("v%d", b.made.Add(1))
	_, err := c.Do(ctx, &pb.Command{Op: &pb.Command_CreateVolume{CreateVolume: &pb.CreateVolume{Name: name, SizeBytes: 1 << 40}}})
	return 1, err
}

// attach makes a volume for each worker.
func (b *metaBench) attach(ctx context.Context) error {
	b.vols, b.next = make([]*pb.Volume, metaClients*metaFlights), make([]uint32, metaClients*metaFlights)
	for i := range b.vols {
		if _, err := b.create(ctx, b.clients[i%metaClients], i); err != nil {
			return err
		}
		res, err := b.clients[i%metaClients].Do(ctx, &pb.Command{Op: &pb.Command_Attach{Attach: &pb.Attach{Volume: fmt.Sprintf("v%d", i+1), Host: "host-1", Session: "bench"}}})
		if err != nil {
			return err
		}
		b.vols[i] = res.Volume
	}
	return nil
}

// allocate adds chunks to the worker's volume.
func (b *metaBench) allocate(ctx context.Context, c *metaclient.Client, worker int) (int, error) {
	v, a := b.vols[worker], &pb.Allocate{PreferHost: "host-1"}
	a.VolumeId, a.Epoch, a.Revision = v.Id, v.Epoch, v.Revision
	for range allocBatch {
		a.Indices = append(a.Indices, b.next[worker])
		b.next[worker] = (b.next[worker] + 1) % (1 << 14)
	}
	res, err := c.Do(ctx, &pb.Command{Op: &pb.Command_Allocate{Allocate: a}})
	if err == nil {
		b.vols[worker] = res.Volume
	}
	return allocBatch, err
}

// The load of the goals: each worker takes its turn once in a while, so that
// all together ask for 1,024 creations and 5,120 chunks a second, evenly.
const (
	metaMixedCreates = 1024
	metaMixedAllocs  = 80 // commands
)

// mixed waits for the worker's turn: most make a volume, some allocate.
func (b *metaBench) mixed(ctx context.Context, c *metaclient.Client, worker int, creates, chunks *atomic.Int64) (int, error) {
	const allocators = 16
	rank, of, rate := worker, allocators, metaMixedAllocs
	if worker >= allocators {
		rank, of, rate = worker-allocators, metaClients*metaFlights-allocators, metaMixedCreates
	}
	each := time.Second * time.Duration(of) / time.Duration(rate)
	due := time.NewTimer(each - time.Duration(time.Now().UnixNano()+int64(rank)*int64(each)/int64(of))%each)
	defer due.Stop()
	select {
	case <-due.C:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	do, done := b.create, creates
	if worker < allocators {
		do, done = b.allocate, chunks
	}
	n, err := do(ctx, c, worker)
	done.Add(int64(n))
	return n, err
}

// latencies returns p50 and p99 of the reads since the last call, in ms.
func (b *metaBench) latencies() (p50, p99 float64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	slices.Sort(b.reads)
	if k := len(b.reads); k > 0 {
		p50, p99 = b.reads[k/2].Seconds()*1e3, b.reads[k*99/100].Seconds()*1e3
	}
	b.reads = nil
	return p50, p99
}

// hosts registers three hosts that beat now.
func (b *metaBench) hosts(ctx context.Context) error {
	c := b.clients[0]
	for i := range byte(3) {
		name, id := fmt.Sprintf("host-%d", i+1), append(make([]byte, 15), i+1)
		for _, cmd := range []*pb.Command{
			{Op: &pb.Command_RegisterHost{RegisterHost: &pb.RegisterHost{Host: &pb.Host{Name: name, DataAddr: name + ":1"}}}},
			{Op: &pb.Command_RegisterStore{RegisterStore: &pb.RegisterStore{Store: &pb.Store{Id: id, Incarnation: 1, Host: name, CapacityBytes: 1 << 50}}}}} {
			if _, err := c.Do(ctx, cmd); err != nil {
				return err
			}
		}
		if err := b.beat(ctx, i); err != nil {
			return err
		}
	}
	return nil
}

func (b *metaBench) beat(ctx context.Context, i byte) error {
	id := append(make([]byte, 15), i+1)
	_, err := b.clients[0].Renew(ctx, &pb.RenewRequest{Host: fmt.Sprintf("host-%d", i+1), Session: "bench", Usage: []*pb.StoreUsage{{Store: id, CapacityBytes: 1 << 50, State: "ok"}}})
	return err
}

// load lets all workers do something for a while, beside heartbeats and a
// reader, and returns how much was done and what it cost.
func (b *metaBench) load(ctx context.Context, do func(ctx context.Context, c *metaclient.Client, worker int) (int, error)) (n int64, cpu time.Duration, err error) {
	var done atomic.Int64
	var wg sync.WaitGroup
	end, cancel := context.WithTimeout(ctx, b.each)
	defer cancel()
	errs := make(chan error, metaClients*metaFlights+2)
	began, err := b.m.cpuTime()
	if err != nil {
		return 0, 0, err
	}
	for w := range metaClients * metaFlights {
		wg.Go(func() {
			for end.Err() == nil {
				k, err := do(ctx, b.clients[w%metaClients], w)
				if err != nil {
					errs <- err
					return
				}
				if end.Err() == nil {
					done.Add(int64(k))
				}
			}
		})
	}
	wg.Go(func() { errs <- b.read(ctx) })
	wg.Go(func() {
		t := time.NewTicker(time.Second)
		defer t.Stop()
		for end.Err() == nil {
			for i := range byte(3) {
				if err := b.beat(ctx, i); err != nil {
					errs <- err
					return
				}
			}
			select {
			case <-t.C:
			case <-end.Done():
			}
		}
	})
	wg.Wait()
	ended, err := b.m.cpuTime()
	close(errs)
	for e := range errs {
		err = errors.Join(err, e)
	}
	return done.Load(), ended - began, err
}

// metaReadEvery is when the next read is due, whether the one before is answered
// or not: what waits behind a slow one has waited since then.
const metaReadEvery = 5 * time.Millisecond

// read has a process of its own ask, as the hosts' do: in this one a read would
// wait for its turn among 128 clients.
func (b *metaBench) read(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, b.bin, "bench", "meta-reader", strings.Join(b.m.apis(), ","), b.each.String())
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("the reader: %w", err)
	}
	var took []time.Duration
	if err := json.Unmarshal(out, &took); err != nil {
		return fmt.Errorf("the reader's answer: %w", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.reads = append(b.reads, took...)
	return nil
}

// ReadMeta asks metadata linearizably for a while, at a steady rate, and writes how
// long each answer took, in nanoseconds, as a list in JSON.
func ReadMeta(ctx context.Context, w io.Writer, addrs []string, each time.Duration) (err error) {
	c := metaclient.New(metaclient.Config{Who: "bench", Addrs: addrs})
	defer func() { err = errors.Join(err, c.Close()) }()
	took := []time.Duration{}
	began := time.Now()
	for due := began; due.Sub(began) < each; due = due.Add(metaReadEvery) {
		time.Sleep(time.Until(due))
		if _, err := c.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Hosts{Hosts: true}}); err != nil {
			return err
		}
		took = append(took, time.Since(due))
	}
	return json.NewEncoder(w).Encode(took)
}

// leaderLoss kills the leader and times the next command.
func (b *metaBench) leaderLoss(ctx context.Context) (ms float64, err error) {
	nodes, err := b.clients[1].Members(ctx)
	if err != nil {
		return 0, err
	}
	for i, p := range b.m.peers {
		if !slices.ContainsFunc(nodes, func(n *pb.NodeReply) bool { return n.Leader && n.Name == p.id }) {
			continue
		}
		at := time.Now()
		if err := b.m.nodes[i].kill(); err != nil {
			return 0, err
		}
		b.m.nodes[i] = nil
		if _, err := b.clients[1].Do(ctx, &pb.Command{Op: &pb.Command_CreateVolume{CreateVolume: &pb.CreateVolume{Name: "after", SizeBytes: 1 << 30}}}); err != nil {
			return 0, err
		}
		return time.Since(at).Seconds() * 1e3, nil
	}
	return 0, errors.New("no metadata node leads")
}

func printMeta(cfg Config, f *MetaFigures) error {
	if cfg.JSON {
		enc := json.NewEncoder(cfg.Out)
		enc.SetIndent("", "  ")
		return enc.Encode(f)
	}
	_, err := fmt.Fprintf(cfg.Out, `metadata, three nodes, a process each, %v each
linearizable read      p50 %.2f ms, p99 %.2f ms, during %.0f creations and %.0f allocations a second together, goal p99 < 10: %s
volume creations       %8.0f /s   %6.0f µs CPU each (three nodes and clients), goal ≥ 1000: %s
chunk allocations      %8.0f /s   %6.1f µs CPU each, %d in a command, goal ≥ 5000: %s
linearizable read      p50 %.2f ms, p99 %.2f ms, during these two, which ask for all there is
leader lost            %.0f ms until the next command is answered, goal < 4000: %s
`, cfg.Each, f.ReadP50Ms, f.ReadP99Ms, f.MixedCreates, f.MixedChunks, met(f.ReadP99Ms < 10 && f.MixedCreates >= 1000 && f.MixedChunks >= 5000),
		f.CreatesPerSecond, f.CreateCPUUs, met(f.CreatesPerSecond >= 1000), f.ChunksPerSecond, f.ChunkCPUUs, allocBatch, met(f.ChunksPerSecond >= 5000),
		f.FullReadP50Ms, f.FullReadP99Ms, f.LeaderLossMs, met(f.LeaderLossMs < 4000))
	return err
}
