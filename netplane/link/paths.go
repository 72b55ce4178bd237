package link

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/status"
)

// Bounds of probing. Loads are small: a probe is 64 bytes, ten a second on each
// path of a peer with connections, two on others, fewer when there are more than
// maxRate of them in a second.
const (
	defaultEvery = 100 * time.Millisecond
	maxRate      = 1000 // probes in a second
	idleEvery    = 5    // rounds between probes to a peer without connections
	silentAfter  = 3    // probes without an answer: the path is dead
	doubtAfter   = 2    // and in doubt
	sizeEvery    = 10   // rounds between probes of the packet size
	smallRounds  = 25   // rounds without an answer to the size believed in: it was too big
	forgetAfter  = 10 * time.Minute
	maxPeers     = 1024
	// hurtFor is how long others come first after a connection stood still.
	hurtFor = 3 * time.Second
	// hurtRounds is smallRounds for a path where one just did.
	hurtRounds = 2
)

// packetSizes are tried, in bytes of an IP packet: jumbo, Ethernet, a tunnel
// over it, and what every IPv6 network passes.
var packetSizes = []int{9000, 1500, 1400, 1280}

const (
	probeBytes = 64
	maxProbe   = 9000
)

// A probe, big endian; the answer is the same bytes:
//
//	magic 8 | path 8 | sequence 8 | padding …
var probeMagic = [8]byte{'c', 'a', 'i', 'r', 'n', 'p', 'r', '1'}

func isProbe(b []byte) bool {
	return len(b) >= probeBytes && len(b) <= maxProbe && [8]byte(b) == probeMagic
}

// PathsConfig says from where paths go.
type PathsConfig struct {
	// Locals are this host's data addresses in the order all hosts list theirs:
	// a plane's connection leaves from the plane's address, so that answers
	// come back over the same plane. Empty: the kernel chooses.
	Locals []netip.Addr
	Names  []string      // of the paths, in the same order, for people; may be short
	Every  time.Duration // between probes of one path; 0: 100 ms
	Log    *slog.Logger  // nil: no log
	// Observe is told of every path that died or came back. May be nil.
	Observe func(PathState)
}

// Paths knows the paths to the peers it was asked to dial, by probing each end
// to end. Its methods may be called concurrently.
type Paths struct {
	cfg  PathsConfig
	quit chan struct{}
	wg   sync.WaitGroup

	mu    sync.Mutex // guards the fields below
	peers map[string]*peer
	byID  map[uint64]*path
	last  uint64 // path id
	socks map[netip.Addr]*net.UDPConn
	round uint64
}

type peer struct {
	paths []*path
	used  time.Time // last dialed
}

// path is one way to one peer.
type path struct {
	id     uint64
	name   string
	remote netip.AddrPort
	local  netip.Addr // zero: the kernel's choice
	conns  atomic.Int64

	dead  atomic.Bool // no probe came back of late
	doubt atomic.Bool // the last few did not, and another path of the peer works
	hurt  atomic.Bool // a connection stood still: see whether big packets pass

	// guarded by Paths.mu
	sent     uint64        // sequence of the last small probe
	sentAt   [8]time.Time  // by sequence modulo 8
	missed   int           // small probes since the last answer, the one under way included
	known    bool          // it has answered once
	rtt      time.Duration // smoothed
	size     int           // biggest packet that passes; 0: not known
	sendable int           // biggest packet this host can send
	sizeMiss int           // rounds since an answer to a probe of that size
	hurtAt   time.Time     // when a connection last stood still
	changed  time.Time     // dead or alive since
}

// PathState is a path as people and programs see it.
type PathState struct {
	Peer   string        `json:"peer"`   // all addresses of the peer
	Name   string        `json:"name"`   // of the path: a spine, or "stable"
	Local  string        `json:"local"`  // "": the kernel's choice
	Remote string        `json:"remote"` // host:port
	Alive  bool          `json:"alive"`
	RTT    time.Duration `json:"rttNs"`
	Packet int           `json:"packetBytes"` // 0: not known
	Conns  int           `json:"connections"`
	Since  time.Time     `json:"since"`
}

// NewPaths starts probing nothing yet.
func NewPaths(cfg PathsConfig) *Paths {
	if cfg.Every <= 0 {
		cfg.Every = defaultEvery
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	p := &Paths{cfg: cfg, quit: make(chan struct{}), peers: map[string]*peer{}, byID: map[uint64]*path{}, socks: map[netip.Addr]*net.UDPConn{}}
	p.wg.Go(p.run)
	return p
}

// Close ends the probing.
func (p *Paths) Close() error {
	close(p.quit)
	p.mu.Lock()
	var errs []error
	for _, s := range p.socks {
		errs = append(errs, s.Close())
	}
	p.mu.Unlock()
	p.wg.Wait()
	return errors.Join(errs...)
}

// Watch begins to probe a peer that may be dialed later.
func (p *Paths) Watch(addrs string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.peer(addrs)
}

// peer returns what is known of a peer. It is nil for one that is not probed:
// one with a single address, where there is nothing to choose, or with names.
func (p *Paths) peer(addrs string) *peer {
	pr := p.peers[addrs]
	if pr == nil {
		if len(p.peers) >= maxPeers {
			return nil
		}
		pr = &peer{}
		list := SplitAddrs(addrs)
		for i, a := range list {
			ap, err := netip.ParseAddrPort(a)
			if err != nil || len(list) == 1 || len(list) > maxAddrs {
				return nil
			}
			p.last++
			w := &path{id: p.last, name: fmt.Sprintf("path-%d", i), remote: ap, changed: time.Now()}
			if i < len(p.cfg.Names) {
				w.name = p.cfg.Names[i]
			}
			if i < len(p.cfg.Locals) && p.cfg.Locals[i].Is4() == ap.Addr().Is4() {
				w.local = p.cfg.Locals[i]
			}
			pr.paths = append(pr.paths, w)
		}
		for _, w := range pr.paths {
			p.byID[w.id] = w
		}
		p.peers[addrs] = pr
	}
	pr.used = time.Now()
	return pr
}

// order returns the ways to a peer, best first: those that answer before those
// that do not; then planes before the stable address, since each is one known
// way whose failure the probes see; then the faster ones; and among equally
// fast ones in turn by prefer, so that replicas of a volume use different ones.
func (p *Paths) order(addrs string, prefer uint64) []candidate {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []candidate
	pr := p.peer(addrs)
	if pr == nil {
		for _, a := range SplitAddrs(addrs) {
			out = append(out, candidate{addr: a})
		}
		return out
	}
	best := time.Duration(0)
	for _, w := range pr.paths {
		if w.known && !w.dead.Load() && (best == 0 || w.rtt < best) {
			best = w.rtt
		}
	}
	class := func(i int) int {
		w := pr.paths[i]
		switch {
		case w.dead.Load() || w.doubt.Load():
			return 3
		case i == 0 && len(pr.paths) > 1, w.sore():
			return 2
		case w.rtt > 2*best+time.Millisecond:
			return 1
		}
		return 0
	}
	var idx []int
	for i := range pr.paths {
		idx = append(idx, i)
	}
	n := uint64(max(1, len(idx)-1))
	turn := func(i int) uint64 { return (uint64(i) + n - prefer%n) % n }
	slices.SortStableFunc(idx, func(a, b int) int {
		return cmp.Or(cmp.Compare(class(a), class(b)), cmp.Compare(turn(a), turn(b)))
	})
	for _, i := range idx {
		w := pr.paths[i]
		out = append(out, candidate{addr: w.remote.String(), local: w.local, mss: w.mss(), path: w})
	}
	return out
}

// mss is what a connection over the path may send at once, 0 where the kernel
// knows that by itself.
func (w *path) mss() int {
	if w.size == 0 || w.size >= w.sendable {
		return 0
	}
	if w.remote.Addr().Is4() {
		return w.size - 40
	}
	return w.size - 60
}

func (w *path) doubtful() bool { return w != nil && w.doubt.Load() }

func (w *path) failed() {
	if w != nil {
		w.hurt.Store(true)
	}
}

// sore reports whether a connection stood still on the path of late.
func (w *path) sore() bool { return w.hurt.Load() || time.Since(w.hurtAt) < hurtFor }

// States returns all paths, of the peers in order.
func (p *Paths) States() []PathState {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []PathState
	for addrs, pr := range p.peers {
		for _, w := range pr.paths {
			out = append(out, w.state(addrs))
		}
	}
	slices.SortStableFunc(out, func(a, b PathState) int { return cmp.Compare(a.Peer, b.Peer) })
	return out
}

func (w *path) state(addrs string) PathState {
	s := PathState{Peer: addrs, Name: w.name, Remote: w.remote.String(), Alive: w.known && !w.dead.Load(), RTT: w.rtt, Packet: w.size,
		Conns: int(w.conns.Load()), Since: w.changed}
	if w.local.IsValid() {
		s.Local = w.local.String()
	}
	return s
}

func (p *Paths) run() {
	t := time.NewTicker(p.cfg.Every)
	defer t.Stop()
	for {
		select {
		case <-p.quit:
			return
		case <-t.C:
		}
		for _, s := range p.tick() {
			p.cfg.Log.Info("path", "peer", s.Peer, "path", s.Name, "remote", s.Remote, "alive", s.Alive)
			if p.cfg.Observe != nil {
				p.cfg.Observe(s)
			}
		}
	}
}

// tick is one round of probes; it returns what has changed since the last one.
func (p *Paths) tick() (news []PathState) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.round++
	every := uint64(1 + len(p.byID)*int(time.Second/p.cfg.Every)/maxRate)
	for addrs, pr := range p.peers {
		busy := false
		for _, w := range pr.paths {
			busy = busy || w.conns.Load() > 0
		}
		if !busy && time.Since(pr.used) > forgetAfter {
			for _, w := range pr.paths {
				delete(p.byID, w.id)
			}
			delete(p.peers, addrs)
			continue
		}
		lively := false
		for _, w := range pr.paths {
			lively = lively || w.missed < doubtAfter
		}
		for _, w := range pr.paths {
			w.doubt.Store(lively && w.missed >= doubtAfter)
			if dead := w.missed >= silentAfter; dead != w.dead.Load() {
				w.dead.Store(dead)
				w.changed = time.Now()
				news = append(news, w.state(addrs))
			}
			due := every
			if !busy {
				due *= idleEvery
			}
			if (p.round+w.id)%due == 0 {
				p.probe(w)
			}
		}
	}
	return news
}

// probe sends what is due on one path. A probe that cannot be sent is one that
// is not answered.
func (p *Paths) probe(w *path) {
	sock, err := p.socket(w)
	w.missed++
	w.sent++
	w.sentAt[w.sent%8] = time.Now()
	if err != nil {
		return
	}
	b := make([]byte, probeBytes, maxProbe)
	copy(b, probeMagic[:])
	binary.BigEndian.PutUint64(b[8:], w.id)
	binary.BigEndian.PutUint64(b[16:], w.sent)
	_, _ = sock.WriteToUDPAddrPort(b, w.remote)
	if w.hurt.Swap(false) {
		w.hurtAt = time.Now()
		w.sizeMiss = max(w.sizeMiss, smallRounds-hurtRounds)
		p.probeSizes(w, sock, b)
	} else if w.sent%sizeEvery == 1 {
		p.probeSizes(w, sock, b)
	}
	if w.size > 0 && w.missed <= 1 { // small ones pass
		if w.sizeMiss++; w.sizeMiss > smallRounds {
			i := slices.Index(packetSizes, w.size)
			w.size, w.sizeMiss = packetSizes[min(i+1, len(packetSizes)-1)], smallRounds-hurtRounds
			p.probeSizes(w, sock, b)
		}
	}
}

// probeSizes asks for the biggest packet that passes, by packets that must not
// be fragmented (RFC 8899). One that this host's link refuses is no candidate.
func (p *Paths) probeSizes(w *path, sock *net.UDPConn, b []byte) {
	head := 28
	if !w.remote.Addr().Is4() {
		head = 48
	}
	w.sendable = 0
	for _, size := range packetSizes {
		if _, err := sock.WriteToUDPAddrPort(b[:size-head], w.remote); err == nil && w.sendable == 0 {
			w.sendable = size
		}
	}
}

// answered takes a probe that came back.
func (p *Paths) answered(b []byte) {
	if !isProbe(b) {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	w := p.byID[binary.BigEndian.Uint64(b[8:])]
	seq := binary.BigEndian.Uint64(b[16:])
	if w == nil || seq > w.sent || seq+8 <= w.sent {
		return
	}
	w.missed, w.known = 0, true
	head := 28
	if !w.remote.Addr().Is4() {
		head = 48
	}
	if len(b) > probeBytes {
		if size := len(b) + head; size >= w.size {
			w.size, w.sizeMiss = size, 0
		}
		return
	}
	rtt := time.Since(w.sentAt[seq%8])
	if w.rtt == 0 {
		w.rtt = rtt
	}
	w.rtt += (rtt - w.rtt) / 8
}

// socket returns the socket a path's probes leave from.
func (p *Paths) socket(w *path) (*net.UDPConn, error) {
	from := w.local
	if !from.IsValid() {
		from = netip.IPv4Unspecified()
		if !w.remote.Addr().Is4() {
			from = netip.IPv6Unspecified()
		}
	}
	if s := p.socks[from]; s != nil {
		return s, nil
	}
	select {
	case <-p.quit:
		return nil, status.Errorf(status.Shutdown, "probing has ended")
	default:
	}
	s, err := probeSocket(netip.AddrPortFrom(from, 0))
	if err != nil {
		return nil, err
	}
	p.socks[from] = s
	p.wg.Go(func() {
		b := make([]byte, maxProbe+1)
		for {
			n, _, err := s.ReadFromUDPAddrPort(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				p.answered(b[:n])
			}
		}
	})
	return s, nil
}

// probeSocket is a UDP socket whose packets are never fragmented and ignore
// what the kernel believes of the path's packet size.
func probeSocket(at netip.AddrPort) (*net.UDPConn, error) {
	network := "udp6"
	if at.Addr().Is4() {
		network = "udp4"
	}
	s, err := net.ListenUDP(network, net.UDPAddrFromAddrPort(at))
	if err != nil {
		return nil, err
	}
	raw, err := s.SyscallConn()
	if err == nil {
		err = control(raw, func(fd int) error {
			if network == "udp4" {
				return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
			}
			return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE)
		})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("prepare a probe's socket: %w", err), s.Close())
	}
	return s, nil
}
