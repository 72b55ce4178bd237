package state

import (
	"bytes"
	"cmp"
	"math"
	"math/bits"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// validName: 1–63 characters, a–z 0–9 first, then also . _ -
func validName(s string) bool {
	if len(s) == 0 || len(s) > maxNameBytes {
		return false
	}
	for i, c := range []byte(s) {
		plain := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		if !plain && (i == 0 || c != '.' && c != '_' && c != '-') {
			return false
		}
	}
	return true
}

// stamp is a moment as people read it, in UTC: a state has no place of its own.
func stamp(ns int64) string { return time.Unix(0, ns).UTC().Format(time.DateTime + " UTC") }

func badName(what, name string) error {
	return status.Errorf(status.Invalid, "%q is not a name for a %s: use 1 to %d of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit", name, what, maxNameBytes)
}

func member(v *pb.Volume, store []byte) *pb.Member {
	for _, m := range v.GetMembers() {
		if bytes.Equal(m.Store, store) {
			return m
		}
	}
	return nil
}

// NoVolume says that a name is nobody's, and where names are.
func NoVolume(name string) error {
	return status.Errorf(status.NotFound, "there is no volume %q: `cairn volume ls` lists them, with --deleted those that can be had back", name)
}

func (a *apply) find(name string) (*pb.Volume, error) {
	v := VolumeByName(a.kv, name)
	switch {
	case v == nil:
	case v.DeletedUnixNs > 0:
		return nil, status.Errorf(status.NotFound, "volume %s (id:%d) was deleted: `cairn volume undelete id:%d` brings it back", v.Name, v.Id, v.Id)
	default:
		return v, nil
	}
	return nil, NoVolume(name)
}

// pool is what there is to put chunks on.
type pool struct {
	domains int
	largest uint64 // capacity of the largest store
	hosts   int
}

// pool looks at the stores in service until it has seen enough for a volume: there
// may be tens of thousands, and every node looks.
func (a *apply) pool(domain string, size uint64, replicas uint32) pool {
	var p pool
	domains, hosts := map[string]bool{}, map[string]bool{}
	a.kv.Scan(key(tStore), nil, func(_, val []byte) bool {
		s := &pb.Store{}
		if decode(val, s); s.Retired {
			return true
		}
		domains[Label(HostByName(a.kv, s.Host), domain)] = true
		hosts[s.Host] = true
		p = pool{domains: len(domains), hosts: len(hosts), largest: max(p.largest, s.CapacityBytes)}
		return p.domains < int(replicas) || p.most(replicas) < size
	})
	return p
}

// most is how large a volume could become, in bytes.
func (p pool) most(replicas uint32) uint64 {
	hi, lo := bits.Mul64(p.largest, uint64(p.hosts))
	if hi > 0 {
		return math.MaxUint64
	}
	return lo / uint64(replicas)
}

func checkSize(size uint64) error {
	if size == 0 || size%ids.BlockSize != 0 || size > MaxVolumeSize {
		return status.Errorf(status.Invalid, "a volume of %d bytes is not possible: the size must be a multiple of %d, above 0 and at most 1 PiB", size, ids.BlockSize)
	}
	return nil
}

// checkFits refuses a volume that could never be filled. Thin volumes may
// together promise more than there is, one alone may not.
func (p pool) checkFits(size uint64, replicas uint32) error {
	if most := p.most(replicas); size > most {
		return status.Errorf(status.NoSpace, "a volume of %s can never be filled: the stores of %d hosts, of at most %s each, hold %s at %d replicas; add stores or make it smaller", ids.FormatSize(size), p.hosts, ids.FormatSize(p.largest), ids.FormatSize(most), replicas)
	}
	return nil
}

func (a *apply) createVolume(op *pb.CreateVolume) (*pb.Result, error) {
	made, err := a.create(op, []string{op.Name})
	if err != nil {
		return nil, err
	}
	return &pb.Result{Volume: made[0]}, nil
}

func (a *apply) createVolumes(op *pb.CreateVolumes) (*pb.Result, error) {
	if n := len(op.Names); n == 0 || n > MaxNames || op.Like == nil {
		return nil, status.Errorf(status.Invalid, "one command creates 1 to %d volumes, not %d: ask several times", MaxNames, n)
	}
	made, err := a.create(op.Like, op.Names)
	if err != nil {
		return nil, err
	}
	return &pb.Result{Volumes: made}, nil
}

// create makes a volume of each name, or none.
func (a *apply) create(op *pb.CreateVolume, names []string) ([]*pb.Volume, error) {
	n := uint64(len(names))
	seen := make(map[string]bool, n)
	for _, name := range names {
		switch {
		case !validName(name):
			return nil, badName("volume", name)
		case seen[name]:
			return nil, status.Errorf(status.Invalid, "volume %s is to be created twice: name each one once", name)
		}
		seen[name] = true
	}
	if err := checkSize(op.SizeBytes); err != nil {
		return nil, err
	}
	v := &pb.Volume{SizeBytes: op.SizeBytes, ChunkBytes: op.ChunkBytes, Replicas: op.Replicas, Domain: op.Domain,
		Tenant: op.Tenant, Tags: op.Tags, Thick: op.Thick, Qos: op.Qos}
	if err := cmp.Or(checkTags(op.Tags), checkQos(op.Qos)); err != nil {
		return nil, err
	}
	if op.Tenant != "" && !validName(op.Tenant) {
		return nil, badName("tenant", op.Tenant)
	}
	if v.ChunkBytes == 0 {
		v.ChunkBytes = ids.DefaultChunkBytes
	}
	if v.ChunkBytes < 1<<20 || v.ChunkBytes > 1<<30 || v.ChunkBytes&(v.ChunkBytes-1) != 0 {
		return nil, status.Errorf(status.Invalid, "chunks of %d bytes are not possible: the size must be a power of two from 1 MiB to 1 GiB", v.ChunkBytes)
	}
	switch v.Domain {
	case "":
		v.Domain = "host"
	case "host", "rack", "zone":
	default:
		return nil, status.Errorf(status.Invalid, "%q is not a failure domain: use host, rack or zone", v.Domain)
	}
	if v.Replicas > 5 {
		return nil, status.Errorf(status.Invalid, "%d replicas are not possible: 1 to 5", v.Replicas)
	}
	const usual = 3
	p := a.pool(v.Domain, v.SizeBytes, cmp.Or(v.Replicas, usual))
	if v.Replicas == 0 {
		v.Replicas = uint32(max(1, min(usual, p.domains)))
	}
	if p.domains < int(v.Replicas) {
		return nil, status.Errorf(status.NoSpace, "%d replicas need %d failure domains (%s) with stores and there are %d: add hosts or ask for fewer replicas", v.Replicas, v.Replicas, v.Domain, p.domains)
	}
	if err := p.checkFits(v.SizeBytes, v.Replicas); err != nil {
		return nil, err
	}
	for _, name := range names {
		if a.kv.Get(key(tName, name)) != nil {
			return nil, status.Errorf(status.Exists, "volume %s exists already: choose another name", name)
		}
	}
	if err := cmp.Or(a.checkQuota(v.Tenant, n*v.SizeBytes, 0), a.checkThick(n*chargeOf(v).thick, 0)); err != nil {
		return nil, err
	}
	made := make([]*pb.Volume, 0, n)
	for _, name := range names {
		v := proto.CloneOf(v)
		v.Name, v.Id, v.CreatedUnixNs, v.Revision = name, next(a.kv, "volume"), a.now, 1
		put(a.kv, key(tVolume, v.Id), v)
		a.kv.Set(key(tName, v.Name), put64(v.Id))
		a.event("volume %s created: %s, %d replicas", v.Name, ids.FormatSize(v.SizeBytes), v.Replicas)
		made = append(made, v)
	}
	return made, nil
}

func (a *apply) renameVolume(op *pb.RenameVolume) (*pb.Result, error) {
	v, err := a.find(op.Volume)
	if err != nil {
		return nil, err
	}
	if !validName(op.Name) {
		return nil, badName("volume", op.Name)
	}
	if op.Name != v.Name && a.kv.Get(key(tName, op.Name)) != nil {
		return nil, status.Errorf(status.Exists, "volume %s exists already: choose another name", op.Name)
	}
	old := v.Name
	if old != op.Name && FormatOf(a.kv) >= 3 { // whoever uses it, knows it by its name: a client that connects again would not find it
		if err := a.used(v); err != nil {
			return nil, err
		}
	}
	for _, vm := range VMs(a.kv) {
		if vm.Volume == old && old != op.Name {
			return nil, status.Errorf(status.Held, "volume %s is a disk of VM %s: remove the VM first", old, vm.Name)
		}
	}
	a.kv.Delete(key(tName, old))
	v.Name = op.Name
	a.kv.Set(key(tName, v.Name), put64(v.Id))
	put(a.kv, key(tVolume, v.Id), v)
	a.event("volume %s renamed to %s", old, v.Name)
	return &pb.Result{Volume: v}, nil
}

func (a *apply) resizeVolume(op *pb.ResizeVolume) (*pb.Result, error) {
	v, err := a.find(op.Volume)
	if err != nil {
		return nil, err
	}
	if err := checkSize(op.SizeBytes); err != nil {
		return nil, err
	}
	if op.SizeBytes < v.SizeBytes {
		return nil, status.Errorf(status.Invalid, "volume %s has %s: %s would be a shrink, which its gateway does after a look at the data (`cairn volume resize`)", v.Name, ids.FormatSize(v.SizeBytes), ids.FormatSize(op.SizeBytes))
	}
	if err := a.pool(v.Domain, op.SizeBytes, v.Replicas).checkFits(op.SizeBytes, v.Replicas); err != nil {
		return nil, err
	}
	if op.SizeBytes > v.SizeBytes {
		more := op.SizeBytes - v.SizeBytes
		var thick uint64
		if v.Thick {
			thick = more * uint64(v.Replicas)
		}
		if err := cmp.Or(a.checkGrow(v), a.checkQuota(v.Tenant, more, 0), a.checkThick(thick, 0)); err != nil {
			return nil, err
		}
	}
	v.SizeBytes = op.SizeBytes
	put(a.kv, key(tVolume, v.Id), v)
	a.event("volume %s grown to %s", v.Name, ids.FormatSize(v.SizeBytes))
	return &pb.Result{Volume: v}, nil
}

func (a *apply) attach(op *pb.Attach) (*pb.Result, error) {
	v, err := a.find(op.Volume)
	if err != nil {
		return nil, err
	}
	if op.Host == "" || op.Session == "" || len(op.Host) > maxTextBytes || len(op.Session) > maxTextBytes {
		return nil, status.Errorf(status.Invalid, "an attach of %s needs a host and a session", v.Name)
	}
	mine := v.HolderHost == op.Host && v.HolderSession == op.Session
	gone := op.PredecessorGone && v.HolderHost == op.Host
	if v.HolderSession != "" && !v.Maintenance && !mine && !gone && !op.Takeover {
		return nil, status.Errorf(status.Held, "volume %s is held by host %s (session %s): detach it there, or take it over", v.Name, v.HolderHost, v.HolderSession)
	}
	if err := checkTrusted(v); err != nil {
		return nil, err
	}
	if op.Maintenance && v.HolderSession != "" && !(v.Maintenance && (mine || op.Takeover)) {
		return nil, status.Errorf(status.Held, "volume %s is held by host %s: its writer repairs it", v.Name, v.HolderHost)
	}
	if err := a.nextEpoch(v); err != nil {
		return nil, err
	}
	giveUpOpen(v)
	// Moved: some epoch since the last detach is not known to be dead, only its
	// lease can end it. A maintenance session never serves a read.
	v.Moved = v.HolderSession != "" && (v.Moved || !v.Maintenance && !mine && !gone)
	v.Maintenance = op.Maintenance
	v.HolderHost, v.HolderSession, v.AttachedUnixNs = op.Host, op.Session, a.now
	put(a.kv, key(tVolume, v.Id), v)
	a.event("volume %s attached on host %s, epoch %d", v.Name, op.Host, v.Epoch)
	return &pb.Result{Volume: Leaving(a.kv, v), Chunks: Chunks(a.kv, v.Id)}, nil
}

// current returns the volume if epoch is its current one.
func (a *apply) current(id uint64, epoch uint32) (*pb.Volume, error) {
	v := VolumeByID(a.kv, id)
	if v == nil {
		return nil, status.Errorf(status.NotFound, "there is no volume with id %d", id)
	}
	if v.Epoch != epoch || v.HolderSession == "" {
		return nil, status.Errorf(status.Fenced, "epoch %d of volume %s is over (now %d, held by host %q)", epoch, v.Name, v.Epoch, v.HolderHost)
	}
	return v, nil
}

func (a *apply) detach(op *pb.Detach) (*pb.Result, error) {
	v, err := a.current(op.VolumeId, op.Epoch)
	if err != nil {
		return nil, err
	}
	a.event("volume %s detached from host %s", v.Name, v.HolderHost)
	v.HolderHost, v.HolderSession, v.AttachedUnixNs, v.Moved = "", "", 0, false
	v.Maintenance = false
	put(a.kv, key(tVolume, v.Id), v)
	return &pb.Result{Volume: v}, nil
}

func conflict(v *pb.Volume, revision uint64) error {
	return status.Errorf(status.Conflict, "revision %d of volume %s is not the current one (%d): read it again", revision, v.Name, v.Revision)
}

func (a *apply) allocate(op *pb.Allocate) (*pb.Result, error) {
	v, err := a.current(op.VolumeId, op.Epoch)
	if err != nil {
		return nil, err
	}
	if v.Revision != op.Revision {
		return nil, conflict(v, op.Revision)
	}
	if len(op.Indices) == 0 || len(op.Indices) > MaxIndices {
		return nil, status.Errorf(status.Invalid, "an allocation of %d chunks is not possible: 1 to %d at a time", len(op.Indices), MaxIndices)
	}
	chosen := map[uint32]*pb.Chunk{}
	for _, c := range op.Chunks {
		chosen[c.Index] = c
	}
	have, fresh := map[uint32]*pb.Chunk{}, uint64(0)
	in := inService{a: a, domain: v.Domain, seen: map[string]string{}}
	for _, ix := range op.Indices { // check everything before the first write
		if uint64(ix) >= (v.SizeBytes+v.ChunkBytes-1)/v.ChunkBytes {
			return nil, status.Errorf(status.Invalid, "chunk %d is beyond the end of volume %s (%d bytes)", ix, v.Name, v.SizeBytes)
		}
		if _, twice := have[ix]; twice {
			continue
		}
		if have[ix] = ChunkAt(a.kv, v.Id, ix); have[ix] == nil {
			fresh++
			if err := in.checkPlaces(v, chosen[ix]); err != nil {
				return nil, err
			}
		}
	}
	if err := a.checkChunkRoom(v, fresh*v.ChunkBytes*uint64(v.Replicas)); err != nil {
		return nil, err
	}
	res := &pb.Result{}
	joined := false
	id := u64(a.kv.Get(key(tMeta, "chunk"))) // ids are never used again
	for _, ix := range op.Indices {
		c := have[ix]
		if c == nil {
			id++
			c = &pb.Chunk{Index: ix, Id: id, State: pb.ChunkState_CHUNK_STATE_LIVE, Stores: chosen[ix].Stores}
			put(a.kv, key(tChunk, v.Id, ix), c)
			have[ix] = c
			v.ChunkCount++
			for _, s := range c.Stores {
				joined = a.join(v, s) || joined
			}
		}
		res.Chunks = append(res.Chunks, c)
	}
	if fresh > 0 {
		a.kv.Set(key(tMeta, "chunk"), put64(id))
	}
	if joined {
		v.Revision++
	}
	put(a.kv, key(tVolume, v.Id), v)
	res.Volume = v
	return res, nil
}

// checkChunkRoom holds an allocation of so many bytes, all copies, to quotas,
// and to what thick volumes keep.
func (a *apply) checkChunkRoom(v *pb.Volume, fresh uint64) error {
	if fresh == 0 {
		return nil
	}
	thin := fresh
	if v.Thick {
		thin = 0
	}
	return cmp.Or(a.checkQuota(v.Tenant, 0, fresh), a.checkThick(0, thin))
}

// inService looks up each store once for a command: its domain, "" when it is
// not in service.
type inService struct {
	a      *apply
	domain string
	seen   map[string]string
}

func (x *inService) of(id []byte) string {
	if d, ok := x.seen[string(id)]; ok {
		return d
	}
	d := ""
	if s := StoreByID(x.a.kv, id); s != nil && !s.Retired {
		d = Label(HostByName(x.a.kv, s.Host), x.domain)
	}
	x.seen[string(id)] = d
	return d
}

// join makes a store an in-sync member of a volume that never had it: with no
// chunk there it has nothing to catch up.
func (a *apply) join(v *pb.Volume, store []byte) bool {
	if member(v, store) != nil {
		return false
	}
	s := StoreByID(a.kv, store)
	v.Members = append(v.Members, &pb.Member{Store: s.Id, Incarnation: s.Incarnation, Host: s.Host,
		DataAddr: HostByName(a.kv, s.Host).GetDataAddr(), InSync: true})
	a.kv.Set(key(tUse, s.Id, v.Id), []byte{})
	return true
}

// checkPlaces holds the leader's placement to what replication relies on.
func (x *inService) checkPlaces(v *pb.Volume, c *pb.Chunk) error {
	if c == nil {
		return status.Errorf(status.Invalid, "an allocation for volume %s comes without a place for every chunk", v.Name)
	}
	if len(c.Stores) != int(v.Replicas) {
		return status.Errorf(status.Invalid, "chunk %d of volume %s was placed on %d stores instead of %d", c.Index, v.Name, len(c.Stores), v.Replicas)
	}
	seen, inSync := map[string]bool{}, false
	for _, id := range c.Stores {
		d := x.of(id)
		if d == "" {
			return status.Errorf(status.Conflict, "chunk %d of volume %s was placed on store %x, which is not in service", c.Index, v.Name, id)
		}
		if seen[d] {
			return status.Errorf(status.Conflict, "chunk %d of volume %s was placed twice in %s %s", c.Index, v.Name, v.Domain, d)
		}
		seen[d] = true
		m := member(v, id)
		inSync = inSync || m == nil || m.InSync
	}
	if !inSync {
		return status.Errorf(status.Conflict, "chunk %d of volume %s was placed on out-of-sync stores only", c.Index, v.Name)
	}
	return nil
}

func (a *apply) changeMembers(op *pb.ChangeMembers) (*pb.Result, error) {
	res := &pb.Result{}
	for _, ch := range op.Changes {
		r := &pb.MemberResult{}
		v, err := a.changeOne(ch)
		if err != nil {
			r.Status, r.Detail = uint32(status.Of(err)), err.Error()
			v = VolumeByID(a.kv, ch.VolumeId)
		}
		r.Revision = v.GetRevision()
		res.Members = append(res.Members, r)
	}
	return res, nil
}

func (a *apply) changeOne(ch *pb.MemberChange) (*pb.Volume, error) {
	v, err := a.current(ch.VolumeId, ch.Epoch)
	if err != nil {
		return nil, err
	}
	if v.Revision != ch.Revision {
		return nil, conflict(v, ch.Revision)
	}
	n := proto.Clone(v).(*pb.Volume)
	for _, id := range ch.Exclude {
		m := member(n, id)
		if m == nil {
			return nil, status.Errorf(status.NotFound, "store %x is not a member of volume %s", id, v.Name)
		}
		if m.InSync { // the first floor stands: it is the oldest doubt
			m.InSync, m.Floor, m.OutUnixNs = false, ch.Floor, a.now
		}
	}
	if len(ch.Add) > 0 {
		if err := a.addMember(n, ch); err != nil {
			return nil, err
		}
	}
	if len(ch.Exclude) > 0 {
		if err := a.checkCopies(n); err != nil {
			return nil, err
		}
	}
	n.Revision++
	put(a.kv, key(tVolume, n.Id), n)
	a.event("volume %s: %d stores excluded, %d added", n.Name, len(ch.Exclude), min(1, len(ch.Add)))
	return n, nil
}

func (a *apply) addMember(v *pb.Volume, ch *pb.MemberChange) error {
	s, m := StoreByID(a.kv, ch.Add), member(v, ch.Add)
	if s == nil || m == nil {
		return status.Errorf(status.NotFound, "store %x is not a member of volume %s", ch.Add, v.Name)
	}
	if s.Incarnation != ch.AddIncarnation {
		return status.Errorf(status.Conflict, "store %x is incarnation %d, not %d: join it again", ch.Add, s.Incarnation, ch.AddIncarnation)
	}
	m.InSync, m.Incarnation, m.Floor, m.OutUnixNs = true, s.Incarnation, 0, 0
	return nil
}

// checkCopies: every live chunk keeps ≥ 1 in-sync holder. O(chunks of v).
func (a *apply) checkCopies(v *pb.Volume) error {
	good := map[string]bool{}
	for _, m := range v.Members {
		good[string(m.Store)] = m.InSync
	}
	for _, c := range Chunks(a.kv, v.Id) {
		held := false
		for _, s := range c.Stores {
			held = held || good[string(s)]
		}
		if !held && c.State == pb.ChunkState_CHUNK_STATE_LIVE {
			return status.Errorf(status.Conflict, "chunk %d of volume %s would lose its last in-sync copy: wait for the store to come back", c.Index, v.Name)
		}
	}
	return nil
}
