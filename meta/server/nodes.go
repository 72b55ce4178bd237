package server

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/cairnstore/cairn/netplane/link"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// Who is in the cluster is raft's configuration, changed one node at a time.
//
// The nodes a cluster began with have the ids of the configuration files. A
// node that is added later has an id for this life of its directory, NAME~RANDOM:
// one that was removed and comes back with an empty directory is somebody else
// to raft, and nothing it may have promised before counts. An address in the
// configuration is "raft,api"; for nodes in this node's file, the file counts,
// so that they may move.
//
//	added:    waits (role none) → learner, until it has caught up → voter
//	removed:  at once; leadership is never handed over (raft's issue 696), a
//	          leader that removes itself stops and the others elect one

const (
	changeTimeout = 5 * time.Second // of one change of raft's configuration
	learnPoll     = 50 * time.Millisecond
)

// nameOf is what people call a node.
func nameOf(id string) string {
	name, _, _ := strings.Cut(id, "~")
	return name
}

// lifeOf makes the id of a new directory of a node that is to be added.
func lifeOf(name string) string {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails
	return name + "~" + hex.EncodeToString(b[:])
}

// joinAddr is both of a node's addresses as raft's configuration keeps them.
// Each may be a list, with as many entries as the other.
func joinAddr(p Peer) raft.ServerAddress { return raft.ServerAddress(p.RaftAddr + "," + p.APIAddr) }

// cutAddr undoes joinAddr.
func cutAddr(a raft.ServerAddress) (raftAddr, apiAddr string) {
	list := strings.Split(string(a), ",")
	half := (len(list) + 1) / 2
	return strings.Join(list[:half], ","), strings.Join(list[half:], ",")
}

// peerOf resolves a server of raft's configuration.
func (s *Server) peerOf(sv raft.Server) Peer {
	if p, ok := s.addrs[sv.ID]; ok {
		return p
	}
	r, a := cutAddr(sv.Address)
	return Peer{ID: string(sv.ID), RaftAddr: r, APIAddr: a}
}

// servers is raft's latest configuration; before raft runs, or before a leader
// has written to a node that waits, what the file says.
func (s *Server) servers() []raft.Server {
	if r := s.raft.Load(); r != nil {
		if f := r.GetConfiguration(); f.Error() == nil && len(f.Configuration().Servers) > 0 {
			return f.Configuration().Servers
		}
	}
	return s.configuration().Servers
}

// members are all nodes, this one too.
func (s *Server) members() []Peer {
	var out []Peer
	for _, sv := range s.servers() {
		out = append(out, s.peerOf(sv))
	}
	return out
}

func (s *Server) member(id raft.ServerID) (Peer, bool) {
	for _, sv := range s.servers() {
		if sv.ID == id {
			return s.peerOf(sv), true
		}
	}
	return Peer{}, false
}

// role is what a configuration has a node be.
func role(servers []raft.Server, id string) string {
	for _, sv := range servers {
		if string(sv.ID) == id {
			if sv.Suffrage == raft.Voter {
				return "voter"
			}
			return "learner"
		}
	}
	return "none"
}

func voters(servers []raft.Server) (out []raft.Server) {
	for _, sv := range servers {
		if sv.Suffrage == raft.Voter {
			out = append(out, sv)
		}
	}
	return out
}

// dials keeps a connection to every node this one has asked something. Bounded
// by the nodes there have been since the start.
type dials struct {
	mu    sync.Mutex // guards both below
	conns map[string]*grpc.ClientConn
	ended bool
}

func (s *Server) dial(addr string) (*grpc.ClientConn, error) {
	d := &s.dials
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ended {
		return nil, status.Errorf(status.Shutdown, "this node is closing")
	}
	if c := d.conns[addr]; c != nil {
		return c, nil
	}
	creds := insecure.NewCredentials()
	if s.cfg.TLS != nil {
		creds = credentials.NewTLS(s.cfg.TLS)
	}
	c, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(creds), grpc.WithContextDialer(link.Dialer{}.Dial),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second,
			Backoff: backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second}}))
	if err != nil {
		return nil, status.Errorf(status.Invalid, "%q is not the address of a metadata node: %w", addr, err)
	}
	if d.conns == nil {
		d.conns = map[string]*grpc.ClientConn{}
	}
	d.conns[addr] = c
	return c, nil
}

func (d *dials) close() (err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ended = true
	for _, c := range d.conns {
		err = errors.Join(err, c.Close())
	}
	d.conns = nil
	return err
}

// askNode asks whoever is at an address about itself; nil: no answer.
func (s *Server) askNode(ctx context.Context, addr string) *pb.NodeReply {
	c, err := s.dial(addr)
	if err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	rep, err := pb.NewMetaClient(c).Node(ctx, &pb.NodeRequest{})
	if err != nil {
		return nil
	}
	return rep
}

// askAll asks these nodes at once; a nil element has not answered, or is not
// the node it should be.
func (s *Server) askAll(ctx context.Context, ps []Peer) []*pb.NodeReply {
	out := make([]*pb.NodeReply, len(ps))
	var wg sync.WaitGroup
	for i, p := range ps {
		wg.Go(func() {
			if rep := s.askNode(ctx, p.APIAddr); rep != nil && rep.Id == p.ID {
				out[i] = rep
			}
		})
	}
	wg.Wait()
	return out
}

// nodes tells about every member.
func (s *Server) nodes(ctx context.Context) []*pb.NodeReply {
	servers := s.servers()
	ps := s.members()
	out := s.askAll(ctx, ps)
	for i, p := range ps {
		switch {
		case p.ID == s.id:
			out[i] = s.node()
		case out[i] == nil:
			out[i] = &pb.NodeReply{Id: p.ID, Name: nameOf(p.ID), Addr: p.APIAddr, RaftAddr: p.RaftAddr, State: "unreachable", Role: role(servers, p.ID), HeardUnixNs: s.heard(p.ID)}
		}
	}
	return out
}

// heard is when this node, as leader, last heard of another, as Unix nanoseconds;
// 0: it cannot tell. What it knows of the time before it led is the word of the
// leader it followed; of the others an earlier word says nothing, for they have
// answered that leader since.
func (s *Server) heard(id string) int64 {
	r := s.raft.Load()
	s.mu.Lock()
	t := s.tenure
	s.mu.Unlock()
	if r == nil || t == nil {
		return 0
	}
	at := s.trans.reach.last(raft.ServerID(id), time.Now().Add(t.since-boottime()), r.LastContact())
	if at.IsZero() {
		return 0
	}
	return at.UnixNano()
}

// AddNode implements pb.MetaServer.
func (s *Server) AddNode(ctx context.Context, req *pb.AddNodeRequest) (*pb.NodesReply, error) {
	return s.changed(ctx, s.addNode(ctx, req))
}

// RemoveNode implements pb.MetaServer.
func (s *Server) RemoveNode(ctx context.Context, req *pb.RemoveNodeRequest) (*pb.NodesReply, error) {
	return s.changed(ctx, s.removeNode(ctx, req))
}

func (s *Server) changed(ctx context.Context, err error) (*pb.NodesReply, error) {
	if err != nil {
		return &pb.NodesReply{Status: uint32(status.Of(err)), Detail: err.Error(), Leader: s.leaderAPI()}, nil
	}
	return &pb.NodesReply{Nodes: s.nodes(ctx)}, nil
}

// addNode makes the node at an address a voter, once it has everything.
func (s *Server) addNode(ctx context.Context, req *pb.AddNodeRequest) error {
	t, err := s.lead()
	if err != nil {
		return err
	}
	if err := s.still(t); err != nil {
		return err
	}
	rep := s.askNode(ctx, req.ApiAddr)
	if rep == nil {
		return status.Errorf(status.NotFound, "no metadata node answers at %s: start it there with `join = true` in its configuration first", req.ApiAddr)
	}
	p := Peer{ID: rep.Id, RaftAddr: rep.RaftAddr, APIAddr: req.ApiAddr}
	servers := s.servers()
	switch role(servers, p.ID) {
	case "voter":
		return nil
	case "none":
		used, err := s.formatInUse()
		if err != nil {
			return err
		}
		if err := s.admit(servers, rep, used); err != nil {
			return err
		}
		f := s.raft.Load().AddNonvoter(raft.ServerID(p.ID), joinAddr(p), 0, changeTimeout)
		if err := s.answer(f); err != nil {
			return s.changeFailed(p.ID, err)
		}
	}
	if err := s.waitCaughtUp(ctx, p); err != nil {
		return err
	}
	if err := s.answer(s.raft.Load().AddVoter(raft.ServerID(p.ID), joinAddr(p), 0, changeTimeout)); err != nil {
		return s.changeFailed(p.ID, err)
	}
	s.log.Info("metadata node added", "node", p.ID, "raft", p.RaftAddr, "api", p.APIAddr)
	return nil
}

func (s *Server) changeFailed(id string, err error) error {
	if errors.Is(err, raft.ErrNotLeader) {
		return s.notLeader()
	}
	return status.Errorf(status.Unknown, "it is not known whether the metadata cluster has taken the change of node %s (%w): ask again", nameOf(id), err)
}

// admit refuses who cannot be a new node of this cluster.
func (s *Server) admit(servers []raft.Server, rep *pb.NodeReply, used uint32) error {
	switch {
	case rep.Role != "none" || !strings.Contains(rep.Id, "~"):
		return status.Errorf(status.Conflict, "node %s at %s does not wait to be added: start it with an empty directory and `join = true`", rep.Name, rep.Addr)
	case s.cfg.Cluster != "" && rep.Cluster != "" && rep.Cluster != s.cfg.Cluster:
		return status.Errorf(status.Conflict, "node %s at %s belongs to cluster %s and this is cluster %s: correct its configuration", rep.Name, rep.Addr, rep.Cluster, s.cfg.Cluster)
	case rep.Format < used:
		return status.Errorf(status.Unsupported, "node %s at %s can apply state version %d and this cluster uses %d: upgrade it first", rep.Name, rep.Addr, rep.Format, used)
	}
	for _, sv := range servers {
		if nameOf(string(sv.ID)) == rep.Name {
			return status.Errorf(status.Exists, "the metadata cluster has a node %s: remove that one first, or give the new one another name", rep.Name)
		}
	}
	return nil
}

// waitCaughtUp waits until a learner has applied what is here now.
func (s *Server) waitCaughtUp(ctx context.Context, p Peer) error {
	need := s.raft.Load().AppliedIndex()
	tick := time.NewTicker(learnPoll)
	defer tick.Stop()
	for {
		rep := s.askNode(ctx, p.APIAddr)
		if rep != nil && rep.Id == p.ID && rep.Applied >= need {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return status.Errorf(status.Unavailable, "metadata node %s is a learner and has not caught up yet (%d of %d): ask again", nameOf(p.ID), rep.GetApplied(), need)
		case <-s.ctx.Done():
			return status.Errorf(status.Unavailable, "this metadata node is closing: ask again")
		}
	}
}

// removeNode takes a node out, if those left can go on.
func (s *Server) removeNode(ctx context.Context, req *pb.RemoveNodeRequest) error {
	t, err := s.lead()
	if err != nil {
		return err
	}
	if err := s.still(t); err != nil {
		return err
	}
	var left []Peer
	var goes *raft.Server
	for _, sv := range s.servers() {
		switch {
		case string(sv.ID) == req.Name || nameOf(string(sv.ID)) == req.Name && goes == nil:
			goes = &sv
		case sv.Suffrage == raft.Voter:
			left = append(left, s.peerOf(sv))
		}
	}
	if goes == nil {
		return status.Errorf(status.NotFound, "there is no metadata node %q: `cairn meta ls` lists them", req.Name)
	}
	if err := s.canLose(ctx, left); err != nil {
		return err
	}
	if err := s.answer(s.raft.Load().RemoveServer(goes.ID, 0, changeTimeout)); err != nil {
		return s.changeFailed(string(goes.ID), err)
	}
	s.log.Info("metadata node removed", "node", goes.ID)
	return nil
}

// canLose makes sure that a majority of those left answers.
func (s *Server) canLose(ctx context.Context, left []Peer) error {
	if len(left) == 0 {
		return status.Errorf(status.Invalid, "the last metadata node cannot be removed: it holds everything")
	}
	up, silent := 0, []string{}
	for i, r := range s.askAll(ctx, left) {
		if r != nil || left[i].ID == s.id {
			up++
		} else {
			silent = append(silent, nameOf(left[i].ID))
		}
	}
	if need := len(left)/2 + 1; up < need {
		return status.Errorf(status.Conflict, "of the %d metadata nodes that would be left only %d answer and %d are needed (%s is silent): add a node first", len(left), up, need, strings.Join(silent, ", "))
	}
	return nil
}

// missing names the voters that do not answer, for errors.
func (s *Server) missing(ctx context.Context) string {
	var ps []Peer
	for _, sv := range voters(s.servers()) {
		if p := s.peerOf(sv); p.ID != s.id {
			ps = append(ps, p)
		}
	}
	var silent []string
	for i, r := range s.askAll(ctx, ps) {
		if r == nil {
			silent = append(silent, fmt.Sprintf("%s (%s)", nameOf(ps[i].ID), ps[i].APIAddr))
		}
	}
	return strings.Join(silent, ", ")
}
