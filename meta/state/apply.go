package state

import (
	"cmp"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// Bounds of what is remembered.
const (
	KeptResults   = 8                 // answers kept per session; a client has one command of a session in flight
	MaxSessions   = 32_768            // beyond it the least recently used goes
	SessionAgeNs  = int64(3600) * 1e9 // an unused session goes after this
	KeptEvents    = 10_000            // events kept
	MaxVolumeSize = uint64(1) << 50   // 1 PiB
	MaxIndices    = 4096              // indices in one Allocate
	MaxNames      = 256               // names in one CreateVolumes
	maxNameBytes  = 63
	maxTextBytes  = 4096 // session names, host names, VM fields
)

// Apply does one command and returns its result; the same command on the same
// state gives the same result and state on every node. A command whose
// (session, seq) was done before changes nothing and gets the first result
// again; the chunk map of an attach is then read anew.
func Apply(kv KV, cmd *pb.Command) *pb.Result {
	now := max(cmd.TimeUnixNs, int64(u64(kv.Get(key(tMeta, "time")))))
	kv.Set(key(tMeta, "time"), put64(uint64(now)))
	expireSessions(kv, now)
	a := &apply{kv: kv, now: now, who: cmd.Who}
	if op := cmd.GetHousekeeping(); op != nil {
		res, err := a.housekeeping(op)
		if err != nil {
			return failed(err)
		}
		return res
	}
	if cmd.Session == "" || len(cmd.Session) > maxNameBytes {
		return failed(status.Errorf(status.Invalid, "a command needs a session name of 1 to %d bytes", maxNameBytes))
	}
	if cmd.GetOpenSession() != nil {
		touch(kv, cmd.Session, now, 0)
		return &pb.Result{}
	}
	if res := remembered(kv, cmd); res != nil {
		if touchable := status.Kind(res.Status) != status.Expired; touchable {
			touch(kv, cmd.Session, now, 0)
		}
		return res
	}
	res, err := a.do(cmd)
	if err != nil {
		res = failed(err)
		a.refusal(cmd, err)
	}
	touch(kv, cmd.Session, now, cmd.Seq)
	kept := res
	if (cmd.GetAttach() != nil || cmd.GetHandOver() != nil) && len(res.Chunks) > 0 {
		kept = proto.Clone(res).(*pb.Result)
		kept.Chunks = nil // a map can be larger than a value may be
	}
	put(kv, key(tReply, cmd.Session, "\x00", cmd.Seq), kept)
	if cmd.Seq > KeptResults {
		kv.Delete(key(tReply, cmd.Session, "\x00", cmd.Seq-KeptResults))
	}
	return res
}

// apply is one command being done. Functions check everything before the first
// write, so that an error leaves the state as it was.
type apply struct {
	kv  KV
	now int64
	who string
}

func failed(err error) *pb.Result {
	return &pb.Result{Status: uint32(status.Of(err)), Detail: err.Error()}
}

// remembered returns the answer that needs no doing: the first one, or that
// the session is gone. nil: do it.
func remembered(kv KV, cmd *pb.Command) *pb.Result {
	s := kv.Get(key(tSession, cmd.Session))
	if s == nil {
		return failed(status.Errorf(status.Expired, "session %s is not open or has expired: open a new one; whether its earlier commands were done must be read", cmd.Session))
	}
	res := &pb.Result{}
	if load(kv, key(tReply, cmd.Session, "\x00", cmd.Seq), res) {
		return withMap(kv, cmd, res)
	}
	if last := u64(s[8:]); cmd.Seq <= last {
		return failed(status.Errorf(status.Expired, "command %d of session %s is too old: its result is no longer kept (last is %d)", cmd.Seq, cmd.Session, last))
	}
	if last := u64(s[8:]); cmd.Seq != last+1 {
		return failed(status.Errorf(status.Invalid, "command %d of session %s does not follow %d: commands of a session are numbered without gaps", cmd.Seq, cmd.Session, last))
	}
	return nil
}

// withMap completes the kept answer of a command that answers a volume's map, from
// the state as it is: the volume too, since a map of now names members of now. An
// attach whose epoch is over by now is refused: its writer would only find itself
// fenced.
func withMap(kv KV, cmd *pb.Command, res *pb.Result) *pb.Result {
	if res.Status != 0 || res.Volume == nil {
		return res
	}
	id := res.Volume.Id
	switch {
	case cmd.GetAttach() != nil:
		v, err := (&apply{kv: kv}).current(id, res.Volume.Epoch)
		if err != nil {
			return failed(err)
		}
		res.Volume, res.Chunks = Leaving(kv, v), Chunks(kv, id)
	case cmd.GetHandOver() != nil:
		res.Chunks = Chunks(kv, id)
	}
	return res
}

// touch opens a session or marks its use; seq 0 leaves its last command alone.
func touch(kv KV, name string, now int64, seq uint64) {
	k := key(tSession, name)
	old := kv.Get(k)
	if old == nil {
		kv.Set(key(tMeta, "sessions"), put64(u64(kv.Get(key(tMeta, "sessions")))+1))
	} else {
		kv.Delete(key(tAge, u64(old), name))
		if seq == 0 {
			seq = u64(old[8:])
		}
	}
	kv.Set(k, append(put64(uint64(now)), put64(seq)...))
	kv.Set(key(tAge, uint64(now), name), []byte{})
}

// expireSessions drops sessions past their age, and the least recently used
// while there are too many. "oldest" is a moment before which none was used
// last: while that is young enough, nothing is looked for.
func expireSessions(kv KV, now int64) {
	n := u64(kv.Get(key(tMeta, "sessions")))
	oldest := int64(u64(kv.Get(key(tMeta, "oldest"))))
	if oldest > 0 && oldest >= now-SessionAgeNs && n < MaxSessions {
		return
	}
	oldest = now
	var gone [][]byte
	kv.Scan(key(tAge), nil, func(k, _ []byte) bool {
		used := int64(u64(k[1:]))
		if used >= now-SessionAgeNs && n-uint64(len(gone)) < MaxSessions {
			oldest = min(oldest, used)
			return false
		}
		gone = append(gone, append([]byte(nil), k...))
		return true
	})
	kv.Set(key(tMeta, "oldest"), put64(uint64(oldest)))
	for _, k := range gone {
		name := string(k[9:])
		kv.Delete(k)
		kv.Delete(key(tSession, name))
		var replies [][]byte
		kv.Scan(key(tReply, name, "\x00"), nil, func(k, _ []byte) bool {
			replies = append(replies, append([]byte(nil), k...))
			return true
		})
		for _, r := range replies {
			kv.Delete(r)
		}
	}
	if len(gone) > 0 {
		kv.Set(key(tMeta, "sessions"), put64(n-uint64(len(gone))))
	}
}

// event appends to the bounded log.
func (a *apply) event(format string, args ...any) { a.log(fmt.Sprintf(format, args...), "") }

// refusal notes what somebody wanted and did not get. What gateways and hosts
// ask for by themselves, again and again, is not noted.
func (a *apply) refusal(cmd *pb.Command, err error) {
	switch cmd.Op.(type) {
	case nil, *pb.Command_Attach, *pb.Command_Detach, *pb.Command_Allocate, *pb.Command_ChangeMembers, *pb.Command_MoveChunks,
		*pb.Command_RegisterStore, *pb.Command_InitCluster, *pb.Command_DroppedCopies, *pb.Command_PutVm:
		return
	}
	m := cmd.ProtoReflect()
	op := m.WhichOneof(m.Descriptor().Oneofs().ByName("op"))
	a.log(strings.ReplaceAll(string(op.Name()), "_", " "), err.Error())
}

// log notes what was done, or why not.
func (a *apply) log(what, outcome string) {
	seq := next(a.kv, "event")
	put(a.kv, key(tEvent, seq), &pb.Event{Seq: seq, TimeUnixNs: a.now, Who: a.who, What: what, Outcome: outcome})
	if seq > KeptEvents {
		a.kv.Delete(key(tEvent, seq-KeptEvents))
	}
}

var errNoOp = errors.New("a command without an operation")

func (a *apply) do(cmd *pb.Command) (*pb.Result, error) {
	switch op := cmd.Op.(type) {
	case *pb.Command_InitCluster:
		return a.initCluster(op.InitCluster)
	case *pb.Command_RegisterHost:
		return a.registerHost(op.RegisterHost)
	case *pb.Command_RegisterStore:
		return a.registerStore(op.RegisterStore.GetStore())
	case *pb.Command_CreateVolume:
		return a.createVolume(op.CreateVolume)
	case *pb.Command_CreateVolumes:
		return a.createVolumes(op.CreateVolumes)
	case *pb.Command_RenameVolume:
		return a.renameVolume(op.RenameVolume)
	case *pb.Command_ResizeVolume:
		return a.resizeVolume(op.ResizeVolume)
	case *pb.Command_DeleteVolume:
		return a.deleteVolume(op.DeleteVolume)
	case *pb.Command_Attach:
		return a.attach(op.Attach)
	case *pb.Command_Detach:
		return a.detach(op.Detach)
	case *pb.Command_Allocate:
		return a.allocate(op.Allocate)
	case *pb.Command_ChangeMembers:
		return a.changeMembers(op.ChangeMembers)
	case *pb.Command_PutVm:
		return a.putVM(op.PutVm)
	case *pb.Command_DeleteVm:
		return a.deleteVM(op.DeleteVm)
	case *pb.Command_SetHost:
		return a.setHost(op.SetHost)
	case *pb.Command_RemoveHost:
		return a.removeHost(op.RemoveHost)
	case *pb.Command_MakeToken:
		return a.makeToken(op.MakeToken)
	case *pb.Command_RevokeToken:
		return a.revokeToken(op.RevokeToken)
	case *pb.Command_UndeleteVolume:
		return a.undeleteVolume(op.UndeleteVolume)
	case *pb.Command_PurgeVolume:
		return a.purgeVolume(op.PurgeVolume)
	case *pb.Command_ShrinkVolume:
		return a.shrinkVolume(op.ShrinkVolume)
	case *pb.Command_UndoShrink:
		return a.undoShrink(op.UndoShrink)
	case *pb.Command_UpdateVolume:
		return a.updateVolume(op.UpdateVolume)
	case *pb.Command_SetTenant:
		return a.setTenant(op.SetTenant)
	case *pb.Command_DroppedCopies:
		return a.dropped(op.DroppedCopies)
	case *pb.Command_TrustVolume:
		return a.trustVolume(op.TrustVolume)
	case *pb.Command_Note:
		return a.note(op.Note)
	case *pb.Command_PrepareSnapshot:
		return a.prepareSnapshot(op.PrepareSnapshot)
	case *pb.Command_NameSnapshots:
		return a.nameSnapshots(op.NameSnapshots)
	case *pb.Command_DeleteSnapshot:
		return a.deleteSnapshot(op.DeleteSnapshot)
	case *pb.Command_CloneVolume:
		return a.cloneVolume(op.CloneVolume)
	case *pb.Command_RollbackVolume:
		return a.rollbackVolume(op.RollbackVolume)
	case *pb.Command_FlattenVolume:
		return a.flattenVolume(op.FlattenVolume)
	case *pb.Command_PruneLayer:
		return a.pruneLayer(op.PruneLayer)
	case *pb.Command_RetireStore:
		return a.retireStore(op.RetireStore)
	case *pb.Command_RemoveStore:
		return a.removeStore(op.RemoveStore)
	case *pb.Command_BindVm:
		return a.bindVM(op.BindVm)
	case *pb.Command_SetPlacement:
		return a.setPlacement(op.SetPlacement.GetPlacement())
	case *pb.Command_MoveChunks:
		return a.moveChunks(op.MoveChunks)
	case *pb.Command_SetReplicas:
		return a.setReplicas(op.SetReplicas)
	case *pb.Command_HandOver:
		return a.handOver(op.HandOver)
	}
	return nil, status.Errorf(status.Unsupported, "%w: is the client newer than this service?", errNoOp)
}

func (a *apply) initCluster(op *pb.InitCluster) (*pb.Result, error) {
	if id := ClusterID(a.kv); id != "" {
		return nil, status.Errorf(status.Exists, "this cluster has the identity %s already", id)
	}
	if op.ClusterId == "" || len(op.ClusterId) > maxNameBytes {
		return nil, status.Errorf(status.Invalid, "a cluster's identity is 1 to %d bytes", maxNameBytes)
	}
	a.kv.Set(key(tMeta, "cluster"), []byte(op.ClusterId))
	a.event("cluster %s begun", op.ClusterId)
	return &pb.Result{ClusterId: op.ClusterId}, nil
}

// eachUser changes a store's membership in every volume that has it. fn says
// whether the change is one of membership, which raises the revision.
func (a *apply) eachUser(store []byte, fn func(*pb.Member) bool) {
	var volumes []uint64
	a.kv.Scan(key(tUse, store), nil, func(k, _ []byte) bool {
		volumes = append(volumes, u64(k[17:]))
		return true
	})
	for _, id := range volumes {
		v := VolumeByID(a.kv, id)
		if m := member(v, store); m != nil {
			if fn(m) {
				v.Revision++
			}
			put(a.kv, key(tVolume, id), v)
		}
	}
}

func (a *apply) registerStore(s *pb.Store) (*pb.Result, error) {
	if len(s.GetId()) != 16 {
		return nil, status.Errorf(status.Invalid, "a store's id is 16 bytes, not %d", len(s.GetId()))
	}
	h := HostByName(a.kv, s.Host)
	if h == nil {
		return nil, status.Errorf(status.NotFound, "host %q is not registered: register the host before its stores", s.Host)
	}
	if s.Class != "" && s.Class != ClassFast && s.Class != ClassSlow {
		return nil, status.Errorf(status.Invalid, "store %x cannot be of class %q: %s or %s", s.Id[:4], s.Class, ClassFast, ClassSlow)
	}
	old := StoreByID(a.kv, s.Id)
	if err := maybeOlder(old, s); err != nil {
		return nil, err
	}
	s = proto.Clone(s).(*pb.Store)
	s.Retired = old.GetRetired() // an operator's word, not the host's
	a.setStore(s.Id, s)
	switch {
	case old == nil:
		a.event("store %x joined on host %s", s.Id[:4], s.Host)
	case old.Incarnation != s.Incarnation:
		a.event("store %x came back as another incarnation: out of sync everywhere", s.Id[:4])
		// Even where it was the last copy: calling another disk in sync would
		// be promoting whatever it holds.
		a.eachUser(s.Id, func(m *pb.Member) bool {
			was := m.InSync
			if was {
				m.OutUnixNs = a.now
			}
			m.Host, m.DataAddr, m.InSync = s.Host, h.DataAddr, false
			return was
		})
	case old.Host != s.Host:
		a.eachUser(s.Id, func(m *pb.Member) bool { m.Host, m.DataAddr = s.Host, h.DataAddr; return false })
	}
	if old != nil && ClassOf(old) != ClassOf(s) {
		a.event("store %x on host %s is %s now", s.Id[:4], s.Host, ClassOf(s))
	}
	return &pb.Result{}, nil
}

func (a *apply) putVM(op *pb.PutVM) (*pb.Result, error) {
	vm := op.GetVm()
	if !validName(vm.GetName()) {
		return nil, badName("VM", vm.GetName())
	}
	old := VMByName(a.kv, vm.Name)
	if op.Create && old != nil {
		return nil, status.Errorf(status.Exists, "VM %s exists already: choose another name or remove it first", vm.Name)
	}
	if !op.Create && old == nil {
		return nil, status.Errorf(status.NotFound, "there is no VM %s: create it first", vm.Name)
	}
	vm = proto.Clone(vm).(*pb.VM)
	vm.CreatedUnixNs = a.now
	if old != nil {
		vm.CreatedUnixNs = old.CreatedUnixNs
	}
	if vm.Queue = old.GetQueue(); old.GetHost() != vm.Host || old.GetDesired() != vm.Desired {
		vm.Queue = nil
	}
	if err := cmp.Or(checkVM(vm), checkStep(vm), checkMotion(old, vm, false), a.checkRoom(old, vm)); err != nil {
		return nil, err
	}
	a.storeVM(old, vm)
	if old == nil || old.Desired != vm.Desired || old.Host != vm.Host {
		a.event("VM %s: %s on host %q", vm.Name, vm.Desired, vm.Host)
	}
	return &pb.Result{Vm: vm}, nil
}

func (a *apply) deleteVM(op *pb.DeleteVM) (*pb.Result, error) {
	vm := VMByName(a.kv, op.Name)
	if vm == nil {
		return nil, status.Errorf(status.NotFound, "there is no VM %q: `cairn vm ls` lists them", op.Name)
	}
	if vm.Desired == "running" {
		return nil, status.Errorf(status.Held, "VM %s is running on host %s: stop it first", vm.Name, vm.Host)
	}
	a.unindexVM(vm)
	a.kv.Delete(key(tVM, op.Name))
	a.event("VM %s removed", op.Name)
	return &pb.Result{Vm: vm}, nil
}
