package server

import (
	"context"
	"math"
	"slices"
	"strings"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// The ways in, in this order: Do (check → prepare → commit → finish), Renew,
// Query, Node.

const (
	maxCommand = 1 << 20  // encoded; raft's log and Badger's values take more
	freeFloor  = 64 << 20 // below it only what keeps volumes running is taken
	freeLast   = 16 << 20 // below it nothing (room.go)
	maxEvents  = 1000     // in one answer
)

// Do implements pb.MetaServer.
func (s *Server) Do(ctx context.Context, cmd *pb.Command) (*pb.Result, error) {
	res, err := s.do(ctx, cmd)
	s.counters.commands.Add(1)
	if err != nil || res.Status != 0 {
		s.counters.refused.Add(1)
	}
	if err != nil {
		kind := status.Of(err)
		res = &pb.Result{Status: uint32(kind), Detail: err.Error(), Refused: kind != status.Unknown}
		if kind == status.Unavailable {
			res.Leader = s.leaderAPI()
		}
	}
	return res, nil
}

// do returns what the state machine said, or an error: Unknown if the command
// may have been done, any other kind if it was not and has used no number.
func (s *Server) do(ctx context.Context, cmd *pb.Command) (*pb.Result, error) {
	t, err := s.lead()
	if err != nil {
		return nil, err
	}
	if n := proto.Size(cmd); n > maxCommand {
		return nil, status.Errorf(status.TooBig, "a metadata command of %d bytes is over the limit of %d: split it", n, maxCommand)
	}
	if err := s.checkFree(cmd); err != nil {
		return nil, err
	}
	if err := s.checkFormat(cmd); err != nil {
		return nil, err
	}
	var prev *pb.Volume // as it was before an attach
	switch op := cmd.Op.(type) {
	case *pb.Command_Attach:
		prev, err = s.prepareAttach(t, op.Attach)
	case *pb.Command_Detach:
		err = s.prepareDetach(ctx, t, op.Detach)
	case *pb.Command_Allocate:
		err = s.place(t, op.Allocate)
	case *pb.Command_SetPlacement:
		err = s.cfg.Placer.CheckPolicy(op.SetPlacement.GetPlacement())
	case *pb.Command_MoveChunks:
		err = s.placeMoves(t, op.MoveChunks)
	}
	if err != nil {
		return nil, err
	}
	cmd.TimeUnixNs = s.cfg.clock().UnixNano()
	b, err := proto.Marshal(cmd)
	if err != nil {
		return nil, status.Errorf(status.Invalid, "a metadata command that cannot be encoded: %w", err)
	}
	res, err := s.commit(b)
	if err != nil || res.Status != 0 {
		return res, err
	}
	switch op := cmd.Op.(type) {
	case *pb.Command_Attach:
		return res, s.finishAttach(ctx, t, op.Attach, prev, res.Volume)
	case *pb.Command_HandOver:
		for _, v := range res.Volumes {
			t.leases.handed(v, boottime())
		}
	case *pb.Command_DeleteVolume:
		t.leases.forget(res.Volume.GetId())
	case *pb.Command_BindVm, *pb.Command_PutVm, *pb.Command_DeleteVm, *pb.Command_SetPlacement, *pb.Command_RegisterHost:
		s.kickSchedule()
	}
	return res, nil
}

// checkFree keeps room on the disk. Exclusions, detaches and deletions go on
// longer: without them guests stand still, or nothing gets better.
func (s *Server) checkFree(cmd *pb.Command) error {
	free, err := s.cfg.free(s.cfg.Dir)
	if err != nil {
		return status.Errorf(status.IO, "the metadata leader cannot see its free space: %w", err)
	}
	where := "the metadata leader " + nameOf(s.id)
	if others := s.quorumFree.Load(); others < free { // a commit needs room on a majority
		free, where = others, "a majority of the metadata nodes"
	}
	floor := uint64(freeFloor)
	switch cmd.Op.(type) {
	case nil, *pb.Command_Housekeeping, *pb.Command_PurgeVolume, *pb.Command_DroppedCopies, *pb.Command_ChangeMembers, *pb.Command_Detach, *pb.Command_DeleteVolume, *pb.Command_OpenSession:
		floor = freeLast
	}
	if free < floor {
		return status.Errorf(status.NoSpace, "%s has %d MiB left on the disk of its metadata and keeps %d free: make room there", where, free>>20, floor>>20)
	}
	return nil
}

// peerFree notes the most that a majority has free.
func (s *Server) peerFree(replies []*pb.NodeReply) {
	var free []uint64
	for _, r := range replies {
		if r.Role == "voter" {
			free = append(free, r.FreeBytes)
		}
	}
	slices.Sort(free)
	if n := len(free); n > 0 && free[n-1-n/2] > 0 { // 0: a node did not answer, or cannot tell
		s.quorumFree.Store(free[n-1-n/2])
	} else {
		s.quorumFree.Store(math.MaxUint64)
	}
}

// prepareAttach reads the volume as it is, and lets the attach take over a
// holder whose lease is over.
func (s *Server) prepareAttach(t *tenure, op *pb.Attach) (v *pb.Volume, err error) {
	err = s.fsm.read(func(kv state.KV) { v = state.VolumeByName(kv, op.Volume) })
	if err == nil && v != nil && v.HolderSession != "" && t.leases.held(v, boottime()) == 0 {
		op.Takeover = true
	}
	return v, err
}

// finishAttach holds the answer to a committed attach back until no read of an
// older epoch can still be served. The tenure must be the one in which the
// leases were counted; otherwise the caller asks the new leader again, who
// finds the attach done and waits by its own knowledge.
func (s *Server) finishAttach(ctx context.Context, t *tenure, op *pb.Attach, prev, v *pb.Volume) error {
	if now, err := s.lead(); err != nil || now != t {
		return status.Errorf(status.Unknown, "volume %s is attached, but the metadata leader changed before older leases were known to be over: ask again", v.Name)
	}
	same := prev != nil && prev.HolderHost == op.Host
	gone := same && (op.PredecessorGone || prev.HolderSession == op.Session)
	end := t.leases.attached(v, prev, gone, boottime())
	if err := s.waitUntil(ctx, end); err != nil {
		return status.Errorf(status.Unknown, "volume %s is attached, but an older lease is not over (%w): ask again", v.Name, err)
	}
	return nil
}

// prepareDetach waits for epochs older than the one that ends: a volume nobody
// holds has no running lease, and its next attach need not wait.
func (s *Server) prepareDetach(ctx context.Context, t *tenure, op *pb.Detach) error {
	var v *pb.Volume
	err := s.fsm.read(func(kv state.KV) { v = state.VolumeByID(kv, op.VolumeId) })
	if err != nil || v == nil || v.Epoch != op.Epoch || v.HolderSession == "" {
		return err
	}
	if err := s.waitUntil(ctx, t.leases.clear(v)); err != nil {
		return status.Errorf(status.Unavailable, "volume %s is not detached: an older lease is not over (%w): ask again", v.Name, err)
	}
	return nil
}

// Renew implements pb.MetaServer.
func (s *Server) Renew(_ context.Context, req *pb.RenewRequest) (*pb.RenewReply, error) {
	rep, err := s.renew(req)
	s.counters.renewals.Add(1)
	if err != nil {
		rep = &pb.RenewReply{Status: uint32(status.Of(err)), Detail: err.Error(), Leader: s.leaderAPI()}
	}
	return rep, nil
}

// renew takes the time, then verifies the leadership, then grants: a later
// leader is elected after that time, and waits a lease from there. Against an
// attach on this leader leases.grant decides.
func (s *Server) renew(req *pb.RenewRequest) (*pb.RenewReply, error) {
	now := boottime() // not before the host sent the request
	t, err := s.lead()
	if err != nil {
		return nil, err
	}
	if err := s.still(t); err != nil {
		return nil, err
	}
	rep := &pb.RenewReply{LeaseMs: uint32(s.cfg.Lease.Milliseconds())}
	var known bool
	held := map[uint64]bool{}
	err = s.fsm.read(func(kv state.KV) {
		if known = state.HostByName(kv, req.Host) != nil; !known {
			return
		}
		for _, l := range req.Release {
			if v := state.VolumeByID(kv, l.VolumeId); v != nil && v.Epoch == l.Epoch && v.HolderHost == req.Host {
				t.leases.release(l.VolumeId, l.Epoch, req.Host)
			}
		}
		for _, l := range req.Leases {
			if v := holds(kv, req, l); v != nil && t.leases.grant(l.VolumeId, l.Epoch, req.Host, now) {
				rep.Volumes = append(rep.Volumes, state.Leaving(kv, v))
				held[v.Id] = true
			} else {
				rep.Refused = append(rep.Refused, l)
			}
		}
		rep.Maintain = t.care.find(kv, req.Host, now, func(v *pb.Volume) bool { return t.leases.held(v, now) > 0 }, t.moves.wanted)
		if state.FormatOf(kv) >= 2 { // or plans that follow them are refused
			rep.Wishes = t.moves.tell(kv, held, rep.Maintain)
		}
		rep.Vms, rep.BatchCpuMillis = vmsToDo(kv, req.Host)
		rep.QuantumMs = state.PlacementOf(kv).QuantumMs
		rep.NotHere = notHere(kv, req.Host, req.Machines)
	})
	if err != nil {
		return nil, err
	}
	if !known {
		return nil, status.Errorf(status.NotFound, "host %q is not registered: register it before it renews leases", req.Host)
	}
	t.hear(req.Host, req.Usage, now)
	for _, p := range s.members() {
		rep.Meta = append(rep.Meta, p.APIAddr)
	}
	t.hearHeat(req.Heat, held, now)
	return rep, nil
}

// holds returns the volume if the caller is its holder at that epoch.
func holds(kv state.KV, req *pb.RenewRequest, l *pb.Lease) *pb.Volume {
	v := state.VolumeByID(kv, l.VolumeId)
	if v == nil || v.Epoch != l.Epoch || v.HolderHost != req.Host || v.HolderSession != req.Session {
		return nil
	}
	return v
}

// Query implements pb.MetaServer: a linearizable read.
func (s *Server) Query(ctx context.Context, req *pb.QueryRequest) (*pb.QueryReply, error) {
	rep, err := s.query(ctx, req)
	s.counters.queries.Add(1)
	if err != nil {
		rep = &pb.QueryReply{Status: uint32(status.Of(err)), Detail: err.Error(), Leader: s.leaderAPI()}
	}
	return rep, nil
}

func (s *Server) query(ctx context.Context, req *pb.QueryRequest) (*pb.QueryReply, error) {
	t, err := s.lead()
	if err != nil {
		return nil, err
	}
	if err := s.still(t); err != nil {
		return nil, err
	}
	rep := &pb.QueryReply{}
	if q, ok := req.Q.(*pb.QueryRequest_PlaceVm); ok {
		rep.PlaceHost, rep.PlaceReason, err = s.placeVM(t, q.PlaceVm)
		return rep, err
	}
	if q, ok := req.Q.(*pb.QueryRequest_Place); ok {
		rep.Place, err = s.answerPlace(t, q.Place)
		return rep, err
	}
	var bad error
	err = s.fsm.read(func(kv state.KV) { bad = t.answer(kv, req, rep) })
	if err == nil {
		err = bad
	}
	if _, ok := req.Q.(*pb.QueryRequest_Cluster); ok && err == nil {
		rep.Nodes = s.nodes(ctx)
	}
	return rep, err
}

// answer reads from the state.
func (t *tenure) answer(kv state.KV, req *pb.QueryRequest, rep *pb.QueryReply) error {
	switch q := req.Q.(type) {
	case *pb.QueryRequest_Volume:
		v := state.VolumeByName(kv, q.Volume)
		if v == nil {
			return state.NoVolume(q.Volume)
		}
		rep.Volumes = []*pb.Volume{state.Leaving(kv, v)}
		if req.WithChunks {
			rep.Chunks = state.Chunks(kv, v.Id)
		}
		if req.WithOrigins {
			rep.Origins = state.Origins(kv, v)
		}
	case *pb.QueryRequest_LayersOf:
		rep.Layers = state.LayersOf(kv, q.LayersOf.GetVolumeIds())
	case *pb.QueryRequest_Volumes:
		rep.Volumes = state.Volumes(kv)
	case *pb.QueryRequest_Hosts:
		rep.Hosts, rep.PoolMark = t.hostStates(kv, boottime()), t.poolMark()
	case *pb.QueryRequest_Vm:
		vm := state.VMByName(kv, q.Vm)
		if vm == nil {
			return status.Errorf(status.NotFound, "there is no VM %q: `cairn vm ls` lists them", q.Vm)
		}
		rep.Vms = []*pb.VM{vm}
	case *pb.QueryRequest_Vms:
		rep.Vms = state.VMs(kv)
	case *pb.QueryRequest_DeletedVolumes:
		rep.Volumes = state.DeletedVolumes(kv)
	case *pb.QueryRequest_Tenants:
		rep.Tenants, rep.Pool = state.Tenants(kv), state.PoolOf(kv)
		rep.Pool.CapacityBytes = state.StoreBytes(kv)
		if req.WithVolumes {
			rep.Volumes = append(state.Volumes(kv), state.DeletedVolumes(kv)...)
		}
	case *pb.QueryRequest_Tokens:
		rep.Tokens = state.Tokens(kv)
	case *pb.QueryRequest_Waste:
		rep.Waste = state.WasteOf(kv, q.Waste)
	case *pb.QueryRequest_Cluster:
	case *pb.QueryRequest_Gone:
		rep.Gone = state.Gone(kv, q.Gone.GetVolumeIds())
	case *pb.QueryRequest_Events:
		limit := int(q.Events.GetLimit())
		if limit <= 0 || limit > maxEvents {
			limit = maxEvents
		}
		rep.Events = state.Events(kv, q.Events.GetAfter(), limit)
	default:
		return status.Errorf(status.Unsupported, "a query without a question: is the client newer than this service?")
	}
	rep.ClusterId = state.ClusterID(kv)
	return nil
}

// Node implements pb.MetaServer.
func (s *Server) Node(_ context.Context, req *pb.NodeRequest) (*pb.NodeReply, error) {
	if req.TermOnly {
		return &pb.NodeReply{Id: s.id, VotingTerm: s.votingTerm()}, nil
	}
	return s.node(), nil
}

func (s *Server) node() *pb.NodeReply {
	self := s.addrs[raft.ServerID(s.id)]
	rep := &pb.NodeReply{Id: s.id, Name: nameOf(s.id), Addr: self.APIAddr, RaftAddr: self.RaftAddr, Cluster: s.cfg.Cluster, Format: s.cfg.format, Program: s.cfg.Program, UnixNs: s.cfg.clock().UnixNano()}
	if used, err := s.formatInUse(); err == nil { // without it, it is shown as 0
		rep.FormatInUse = used
	}
	rep.Applied, rep.StateHash = s.fsm.at()
	rep.AuditIndex, rep.AuditHash = s.fsm.audit()
	servers := s.servers()
	rep.Role = role(servers, s.id)
	if free, err := s.cfg.free(s.cfg.Dir); err == nil { // without it, it is shown as 0, which no full disk is
		rep.FreeBytes = max(free, 1)
	}
	r := s.raft.Load()
	if r == nil {
		rep.State, rep.LastIndex, rep.Term = *s.phase.Load(), s.oldIndex, s.oldTerm
		return rep
	}
	rep.Term, rep.LastIndex, rep.LeaderAddr = r.CurrentTerm(), r.LastIndex(), s.leaderAPI()
	rep.State = strings.ToLower(r.State().String())
	rep.Leader = rep.State == "leader"
	if rep.Role == "none" && rep.LastIndex == 0 {
		rep.State, rep.Detail = "waiting", "to be added with `cairn meta add`"
	}
	return rep
}
