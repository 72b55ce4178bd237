package server

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// Peer is one node of the metadata cluster.
type Peer struct{ ID, RaftAddr, APIAddr string }

// Config configures one node. Peers names every node, this one too, and is the
// same on all of them when the cluster is first started.
type Config struct {
	ID           string
	Cluster      string // identity written into the directory and compared at every start; "": not compared
	Dir          string
	RaftListener net.Listener // closed by Close, also when New fails
	APIListener  net.Listener // the same
	Peers        []Peer
	Join         bool // begin with an empty directory and wait to be added; Peers is this node alone
	Placer       Placer
	TLS          *tls.Config   // for both listeners and for calls to peers; nil: plain
	Timeout      time.Duration // heartbeat and election timeout; 0: 1 s
	Lease        time.Duration // 0: 8 s; the same on every node, and only tests change it
	Fatal        func(error)   // called once when the node cannot go on, if set; Done is closed too
	Log          *slog.Logger  // nil: slog.Default
	Program      string        // the commit it was built from, for those who ask

	// For tests of this package.
	logs      func(raft.LogStore) raft.LogStore // wraps raft's log
	format    uint32                            // state.Format of an older or a newer program
	free      func(dir string) (uint64, error)  // free bytes of the file system
	clock     func() time.Time                  // the time of day
	tick      time.Duration                     // of the watchdog
	audit     time.Duration                     // between audits
	snapEvery uint64                            // entries between snapshots, and kept behind one
}

// Server is a running node of the metadata service.
type Server struct {
	pb.UnimplementedMetaServer
	cfg   Config
	log   *slog.Logger
	dir   *nodeDir
	fsm   *fsm
	bolt  *logFile
	logs  *sealedLog // in bolt
	vote  sealedVote // in bolt
	snaps *sealedSnaps
	id    string                 // to raft; see nodes.go
	dials dials                  // to other nodes
	addrs map[raft.ServerID]Peer // in the file
	kept  bool                   // the state in Badger needs no restoring

	// What a node says of itself before raft runs.
	phase             atomic.Pointer[string] // new or starting
	oldIndex, oldTerm uint64                 // in its directory

	grpc   *grpc.Server
	ctx    context.Context // ends when Close begins
	cancel context.CancelFunc
	wg     sync.WaitGroup

	raft       atomic.Pointer[raft.Raft] // nil until the node takes part
	trans      *transport                // set before raft
	verify     verifier
	lateness   lateness // of answers to confirm
	flight     flight
	silent     silence
	watches    atomic.Int64 // streams of Watch
	counters   counters
	census     census
	quorumFree atomic.Uint64 // bytes that a majority has free on its disks, at least
	kick       chan struct{} // the queue of VMs has something to do

	mu     sync.Mutex // guards tenure, err, closed
	tenure *tenure
	err    error
	closed bool
	done   chan struct{}
}

var _ pb.MetaServer = (*Server)(nil)

// New starts a node. It returns before the node has joined its peers.
func New(cfg Config) (*Server, error) {
	s, err := begin(cfg)
	if err != nil {
		for _, l := range []net.Listener{cfg.RaftListener, cfg.APIListener} {
			if l != nil {
				err = errors.Join(err, closeListener(l))
			}
		}
		return nil, err
	}
	return s, nil
}

func closeListener(l net.Listener) error {
	if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

func (cfg *Config) check() error {
	if cfg.RaftListener == nil || cfg.APIListener == nil || cfg.Dir == "" || cfg.Placer == nil {
		return status.Errorf(status.Invalid, "a metadata node needs a directory, two listeners and a placer")
	}
	seen, me := map[string]bool{}, false
	for _, p := range cfg.Peers {
		if p.ID == "" || p.RaftAddr == "" || p.APIAddr == "" || seen[p.ID] {
			return status.Errorf(status.Invalid, "metadata peer %q needs an id of its own and two addresses", p.ID)
		}
		seen[p.ID] = true
		me = me || p.ID == cfg.ID
	}
	if cfg.Join && len(cfg.Peers) != 1 {
		return status.Errorf(status.Invalid, "metadata node %s waits to be added to a cluster: its only peer is itself", cfg.ID)
	}
	if !me {
		return status.Errorf(status.Invalid, "metadata node %q is not among its own peers: add it to the list", cfg.ID)
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = time.Second
	}
	if cfg.Lease == 0 {
		cfg.Lease = leaseLength
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.format == 0 {
		cfg.format = state.Format
	}
	if cfg.free == nil {
		cfg.free = freeBytes
	}
	if cfg.clock == nil {
		cfg.clock = time.Now
	}
	if cfg.audit == 0 {
		cfg.audit = auditEvery
	}
	if cfg.tick == 0 {
		cfg.tick = 500 * time.Millisecond
	}
	return nil
}

func freeBytes(dir string) (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return st.Bavail * uint64(st.Bsize), nil
}

func begin(cfg Config) (_ *Server, err error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, log: cfg.Log.With("node", cfg.ID), addrs: map[raft.ServerID]Peer{}, done: make(chan struct{}), kick: make(chan struct{}, 1)}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.quorumFree.Store(math.MaxUint64)
	for _, p := range cfg.Peers {
		s.addrs[raft.ServerID(p.ID)] = p
	}
	defer func() {
		if err != nil {
			s.cancel()
			err = errors.Join(err, s.closeFiles())
		}
	}()
	if s.dir, err = openDir(cfg.Dir, cfg.ID, cfg.Cluster); err != nil {
		return nil, err
	}
	if err = s.room(freeOpen); err != nil {
		return nil, err
	}
	if err = s.begins(); err != nil {
		return nil, err
	}
	if err = s.openHealing(); err != nil {
		return nil, err
	}
	if err = s.putAside(); err != nil {
		return nil, err
	}
	s.serve()
	if !s.dir.rec.Joined {
		if len(s.others()) > 0 {
			s.wg.Go(s.enter)
			return s, nil
		}
		err = s.decide()
	}
	if err == nil {
		err = s.start()
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// begins gives the node its id. Crash points: before the record the next start
// makes another id, of which nobody has heard.
func (s *Server) begins() error {
	rec := &s.dir.rec
	switch {
	case rec.Removed:
		return status.Errorf(status.Conflict, "metadata node %s was removed from its cluster: move %s away and set `join = true` to add it again", s.cfg.ID, s.dir.path)
	case s.cfg.Join && !rec.Joined && rec.Life == "":
		rec.Life, rec.Joined = lifeOf(s.cfg.ID), true
		if err := s.dir.save(); err != nil {
			return err
		}
	}
	s.id = s.cfg.ID
	if rec.Life != "" { // also when the file does not say join any more
		s.id = rec.Life
		p := s.addrs[raft.ServerID(s.cfg.ID)]
		p.ID = s.id
		delete(s.addrs, raft.ServerID(s.cfg.ID))
		s.addrs[raft.ServerID(s.id)] = p
	}
	return nil
}

// openHealing opens the files; damaged ones are emptied, once, if the others can
// give them back.
func (s *Server) openHealing() error {
	if err := s.heal(); err != nil {
		return err
	}
	err := s.openFiles()
	if status.Of(err) != status.Corrupt || len(s.others()) == 0 {
		return err
	}
	s.log.Error("this metadata node is damaged", "err", err)
	if s.bolt != nil {
		if err := guard("the metadata log", s.bolt.Close); err != nil {
			s.log.Warn("closing what is emptied next", "err", err)
		}
		s.bolt = nil
	}
	s.dir.rec.Doubt = doubtAll
	if err := s.dir.save(); err != nil {
		return err
	}
	if err := s.heal(); err != nil {
		return err
	}
	return s.openFiles()
}

// openFiles opens log, snapshots and state, reads all of the log, and refuses
// what cannot be this node's whole memory.
func (s *Server) openFiles() (err error) {
	if err := s.openLog(); err != nil {
		return err
	}
	files, err := raft.NewFileSnapshotStoreWithLogger(s.dir.path, snapshotsKept, raftLogger(s.log))
	if err != nil {
		return fmt.Errorf("opening the metadata snapshots in %s: %w", s.dir.path, err)
	}
	s.snaps = &sealedSnaps{files, s.dir.file("snapshots"), s.roomToStore}
	has, err := raft.HasExistingState(s.logs, s.vote, s.snaps)
	if err != nil {
		return fmt.Errorf("reading the metadata log: %w", err)
	}
	if s.dir.rec.Joined && s.dir.rec.NeedIndex == 0 && (s.dir.rec.Life == "" || s.dir.rec.Added) && !has {
		return status.Errorf(status.Corrupt, "the metadata log in %s is gone: move the directory away and this node gets everything from the others", s.dir.path)
	}
	first, err := s.logs.FirstIndex()
	if err != nil {
		return fmt.Errorf("reading the metadata log: %w", err)
	}
	last, err := s.logs.LastIndex()
	if err != nil {
		return fmt.Errorf("reading the metadata log: %w", err)
	}
	snaps, err := s.soundSnapshots(first)
	if err != nil {
		return err
	}
	newest := uint64(0)
	if len(snaps) > 0 {
		newest = snaps[0].Index
	}
	s.oldIndex = max(newest, last)
	if s.oldTerm, err = s.vote.GetUint64([]byte("CurrentTerm")); err != nil && !errors.Is(err, raftboltdb.ErrKeyNotFound) {
		return fmt.Errorf("reading the metadata log: %w", err)
	}
	s.say(phaseOf(s.dir.rec))
	if s.fsm, s.kept, err = openFSM(s.dir.file("state"), tableBytes(s.id), newest, last); err != nil {
		return err
	}
	s.fsm.knows, s.fsm.fatal, s.fsm.room = s.cfg.format, s.fail, s.roomToStore
	var used uint32
	if err := s.fsm.read(func(kv state.KV) { used = state.FormatOf(kv) }); err != nil {
		return err
	}
	if used > s.cfg.format {
		return tooNew(used, s.cfg.format)
	}
	return nil
}

// openLog opens raft's log and vote and reads all of both.
func (s *Server) openLog() error {
	name := s.dir.file("raft.db")
	err := guard("the metadata log "+name, func() (err error) {
		s.bolt, err = openLogFile(name, s.log)
		return err
	})
	switch {
	case errors.Is(err, bolterrors.ErrInvalid), errors.Is(err, bolterrors.ErrChecksum), errors.Is(err, bolterrors.ErrVersionMismatch):
		return status.Errorf(status.Corrupt, "the metadata log %s is damaged (%w): move the directory away and this node gets everything from the others", name, err)
	case err != nil:
		return fmt.Errorf("opening the metadata log %s: %w", name, err)
	}
	s.logs = &sealedLog{LogStore: s.bolt}
	s.vote = sealedVote{s.bolt}
	if err := errors.Join(s.logs.check(), s.vote.check()); err != nil {
		return fmt.Errorf("reading the metadata log %s: %w", name, err)
	}
	s.logs.doubt = func(err error) { s.inDoubt(doubtAll, err) }
	s.logs.room = s.roomToStore
	return nil
}

// snapshotsKept is how many snapshots stay on disk: if the newest is damaged,
// the one before and the log kept behind it take its place.
const snapshotsKept = 3

// soundSnapshots reads every snapshot, removes those that are damaged, and makes
// sure that the newest one left and the log after it leave no gap: raft would
// begin with an older one and stop in the middle.
func (s *Server) soundSnapshots(first uint64) ([]*raft.SnapshotMeta, error) {
	all, err := s.snaps.FileSnapshotStore.List()
	if err != nil {
		return nil, fmt.Errorf("listing the metadata snapshots: %w", err)
	}
	var sound []*raft.SnapshotMeta
	for _, m := range all {
		_, r, err := s.snaps.Open(m.ID) // verifies its checksums
		if err == nil {
			err = r.Close()
		}
		if err == nil {
			sound = append(sound, m)
			continue
		}
		s.log.Warn("a metadata snapshot is damaged and removed", "snapshot", m.ID, "err", err)
		if err := os.RemoveAll(filepath.Join(s.snaps.dir, m.ID)); err != nil {
			return nil, err
		}
	}
	switch {
	case len(sound) == 0 && first <= 1 && len(all) == 0, len(sound) > 0 && (first == 0 || first <= sound[0].Index+1):
		return sound, nil
	}
	return nil, status.Errorf(status.Corrupt, "the metadata snapshots in %s are damaged and the log begins after them: move the directory away and this node gets everything from the others", s.dir.path)
}

// Bounds of what one caller can make this node hold.
const (
	maxRequest = 4 << 20
	maxReply   = 64 << 20
	maxStreams = 4096 // calls at once, per connection
)

// serve answers callers from now on; before raft runs, with "not now".
func (s *Server) serve() {
	opts := []grpc.ServerOption{grpc.MaxRecvMsgSize(maxRequest), grpc.MaxSendMsgSize(maxReply),
		grpc.MaxConcurrentStreams(maxStreams), grpc.WaitForHandlers(true), grpc.ConnectionTimeout(10 * time.Second),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true})}
	if s.cfg.TLS != nil {
		opts = append(opts, grpc.Creds(credentials.NewTLS(s.cfg.TLS)))
	}
	s.grpc = grpc.NewServer(opts...)
	pb.RegisterMetaServer(s.grpc, s)
	s.wg.Go(func() {
		if err := s.grpc.Serve(s.cfg.APIListener); err != nil && s.ctx.Err() == nil {
			s.fail(fmt.Errorf("serving metadata at %s: %w", s.cfg.APIListener.Addr(), err))
		}
	})
}

func (s *Server) raftConfig(kept bool) *raft.Config {
	c := raft.DefaultConfig()
	c.LocalID = raft.ServerID(s.id)
	c.HeartbeatTimeout, c.ElectionTimeout = s.cfg.Timeout, s.cfg.Timeout
	c.LeaderLeaseTimeout = s.cfg.Timeout / 2
	c.CommitTimeout = min(c.CommitTimeout, s.cfg.Timeout/4)
	c.BatchApplyCh = false // a batch in the channel would outlive the leadership it was meant for
	c.PreVoteDisabled = false
	c.NoSnapshotRestoreOnStart = kept
	c.NoLegacyTelemetry = true
	c.Logger = raftLogger(s.log)
	if s.cfg.snapEvery > 0 {
		c.SnapshotThreshold, c.TrailingLogs, c.SnapshotInterval = s.cfg.snapEvery, s.cfg.snapEvery, 50*time.Millisecond
	}
	return c
}

func (s *Server) configuration() raft.Configuration {
	var c raft.Configuration
	for _, p := range s.cfg.Peers {
		if s.id == s.cfg.ID { // one that is added is told by a leader
			c.Servers = append(c.Servers, raft.Server{ID: raft.ServerID(p.ID), Address: joinAddr(p)})
		}
	}
	return c
}

// ServerAddr implements raft.ServerAddressProvider.
func (s *Server) ServerAddr(id raft.ServerID) (raft.ServerAddress, error) {
	if p, ok := s.addrs[id]; ok {
		return raft.ServerAddress(p.RaftAddr), nil
	}
	if p, ok := s.member(id); ok {
		return raft.ServerAddress(p.RaftAddr), nil
	}
	return "", status.Errorf(status.NotFound, "metadata node %s is not in the cluster", id)
}

// start runs raft. The node has a record that it takes part.
func (s *Server) start() error {
	rec := s.dir.record()
	var vote *voter
	if rec.NeedIndex > 0 || rec.AboveTerm > 0 && s.oldTerm <= rec.AboveTerm { // raft itself never goes back in terms
		vote = &voter{need: rec.NeedIndex, above: rec.AboveTerm, applied: s.applied,
			header: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(s.id), Addr: []byte(s.addrs[raft.ServerID(s.id)].RaftAddr)}}
	}
	var logs raft.LogStore = s.logs
	if s.cfg.logs != nil {
		logs = s.cfg.logs(logs)
	}
	logs, err := raft.NewLogCache(512, logs)
	if err != nil {
		return err
	}
	s.trans = newTransport(newStreams(s.cfg.RaftListener, s.cfg.TLS), s, vote, s.leadsIn, raftLogger(s.log))
	r, err := raft.NewRaft(s.raftConfig(s.kept), s.fsm, logs, s.vote, s.snaps, s.trans)
	if err != nil {
		return errors.Join(cmp.Or(s.Err(), fmt.Errorf("starting raft: %w", err)), s.trans.Close())
	}
	r.RegisterObserver(raft.NewObserver(nil, false, func(o *raft.Observation) bool {
		if l, ok := o.Data.(raft.LeaderObservation); ok {
			s.trans.reach.follows(l.LeaderID, raft.ServerID(s.id))
		}
		return false
	}))
	s.verify.check, s.verify.done = s.confirm, s.done
	s.mu.Lock()
	closed := s.closed
	if !closed {
		s.raft.Store(r)
		s.wg.Go(s.watchLeadership)
		s.wg.Go(s.watchdog)
		s.wg.Go(s.keepHouse)
		s.wg.Go(s.audits)
		s.wg.Go(s.compare)
		s.wg.Go(s.scheduleLoop)
		s.wg.Go(s.rebalanceLoop)
		s.wg.Go(s.warnLoop)
	}
	s.mu.Unlock()
	if closed {
		return errors.Join(r.Shutdown().Error(), s.trans.Close())
	}
	s.log.Info("metadata node runs", "raft", s.cfg.RaftListener.Addr(), "api", s.cfg.APIListener.Addr(), "state_kept", s.kept)
	return nil
}

// leadsIn reports whether this node leads in that term.
func (s *Server) leadsIn(term uint64) bool {
	r := s.raft.Load()
	return r != nil && r.State() == raft.Leader && r.CurrentTerm() == term
}

func (s *Server) applied() uint64 {
	if r := s.raft.Load(); r != nil {
		return r.AppliedIndex()
	}
	return 0
}

// Done is closed when the node has ended: by Close, or because it cannot go on.
func (s *Server) Done() <-chan struct{} { return s.done }

// Err says why the node ended by itself; nil while it runs and after Close.
func (s *Server) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// fail ends the node's service. Its process should end: what failed may hang,
// and a start from the directory mends what can be mended.
func (s *Server) fail(err error) {
	s.mu.Lock()
	if s.err != nil || s.closed {
		s.mu.Unlock()
		return
	}
	s.err = err
	close(s.done)
	s.mu.Unlock()
	s.log.Error("metadata node cannot go on", "err", err)
	if s.cfg.Fatal != nil {
		s.cfg.Fatal(err)
	}
}

// Close stops the node and returns when nothing of it runs any more. After a
// failure it may wait for what hangs.
func (s *Server) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	if s.err == nil {
		close(s.done)
	}
	s.mu.Unlock()
	s.cancel()
	var err error
	if r := s.raft.Load(); r != nil {
		s.fsm.halt() // raft waits for a snapshot that is being written
		f := r.Shutdown()
		s.grpc.Stop()
		err = errors.Join(f.Error(), s.trans.Close())
	} else {
		s.grpc.Stop()
	}
	s.wg.Wait()
	return errors.Join(err, closeListener(s.cfg.RaftListener), closeListener(s.cfg.APIListener), s.closeFiles())
}

func (s *Server) closeFiles() (err error) {
	err = s.dials.close()
	if s.fsm != nil {
		err = errors.Join(err, s.fsm.close())
		s.fsm = nil
	}
	if s.bolt != nil {
		err = errors.Join(err, s.bolt.Close())
		s.bolt = nil
	}
	if s.dir != nil {
		err = errors.Join(err, s.dir.close())
		s.dir = nil
	}
	return err
}
