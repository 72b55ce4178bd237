package kvm

import "encoding/binary"

// The memory of a micro-guest, identity-mapped by one 2 MiB page:
//
//	0x0000  GDT: null, 64-bit code (0x08), data (0x10)
//	0x0100  IDT: 4 gates, of which 3 (breakpoint) is present
//	0x1000  PML4   0x2000 page directory pointers   0x3000 page directory
//	0x4000  code   0x5000 breakpoint handler        0x6000 result of the SSE store
//	0x8000  top of the stack
const (
	memBytes    = 0x10000
	gdtAt       = 0x0000
	idtAt       = 0x0100
	pml4At      = 0x1000
	pdptAt      = 0x2000
	pdAt        = 0x3000
	codeAt      = 0x4000
	handlerAt   = 0x5000
	resultAt    = 0x6000
	stackAt     = 0x8000
	selCode     = 0x08
	selData     = 0x10
	idtGates    = 4
	loopRounds  = 2_000_000 // 4 M instructions: 1–2 ms on hardware, 20 s interpreted
	handlerMark = 0x4b
)

// microGuest is code that ends with hlt, and how to see that it did its work.
type microGuest struct {
	name  string
	code  []byte
	check func(mem []byte, r *kvmRegs) bool
}

var microGuests = []microGuest{
	{
		name: "an SSE store",
		// pcmpeqd xmm0,xmm0; movups [0x6000],xmm0; hlt
		code: []byte{0x66, 0x0f, 0x76, 0xc0, 0x0f, 0x11, 0x04, 0x25, 0x00, 0x60, 0x00, 0x00, 0xf4},
		check: func(mem []byte, _ *kvmRegs) bool {
			return binary.LittleEndian.Uint64(mem[resultAt:]) == ^uint64(0) &&
				binary.LittleEndian.Uint64(mem[resultAt+8:]) == ^uint64(0)
		},
	},
	{
		name: "an exception in long mode",
		// int3; inc rbx; hlt. The handler sets rbx to 0x4b, so 0x4c shows that
		// it ran and that iretq came back.
		code:  []byte{0xcc, 0x48, 0xff, 0xc3, 0xf4},
		check: func(_ []byte, r *kvmRegs) bool { return r.Rbx == handlerMark+1 },
	},
	{
		name: "a counted loop in good time",
		// mov ecx,loopRounds; 1: dec ecx; jnz 1b; hlt
		code:  append(binary.LittleEndian.AppendUint32([]byte{0xb9}, loopRounds), 0xff, 0xc9, 0x75, 0xfc, 0xf4),
		check: func(_ []byte, r *kvmRegs) bool { return r.Rcx == 0 },
	},
}

// handlerCode is mov ebx,0x4b; iretq.
var handlerCode = []byte{0xbb, handlerMark, 0, 0, 0, 0x48, 0xcf}

// fillMemory writes the tables and a guest's code.
func fillMemory(mem, code []byte) {
	clear(mem)
	le := binary.LittleEndian
	le.PutUint64(mem[gdtAt+selCode:], 0x00af9b000000ffff)
	le.PutUint64(mem[gdtAt+selData:], 0x00cf93000000ffff)
	// A present 64-bit interrupt gate: offset, selector, type 0x8e.
	le.PutUint64(mem[idtAt+3*16:], handlerAt|selCode<<16|0x8e00<<32)
	le.PutUint64(mem[pml4At:], pdptAt|3)
	le.PutUint64(mem[pdptAt:], pdAt|3)
	le.PutUint64(mem[pdAt:], 0x83) // 2 MiB page, present, writable
	copy(mem[codeAt:], code)
	copy(mem[handlerAt:], handlerCode)
}
