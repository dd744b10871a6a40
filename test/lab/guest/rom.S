# The whole firmware and program of the lab's KVM guests: 64 KiB of ROM that
# start in real mode, which needs no more of /dev/kvm than to emulate. SeaBIOS
# takes 11 s of CPU where real mode is emulated.
#
# as --defsym MODE=n: 0 idle   halt for ever
#                     1 burn   every vCPU turns in a loop
#                     2 pulse  woken 18.2 times a second, 2,000 turns each
#                     3 disk   COUNT reads of one sector from the IDE disk, then idle
# On COM1: 'R' when started, 'D' when the disk's reads are done.
.code16
.globl _start
_start:
	cli
	mov	$0x1b, %ecx		# IA32_APIC_BASE: bit 8 is set on the first vCPU
	rdmsr
	test	$0x100, %eax
	jz	other
	xor	%ax, %ax
	mov	%ax, %ds
	mov	%ax, %ss
	mov	$0x7000, %sp
	mov	$0x3f8, %dx
	mov	$'R', %al
	outb	%al, %dx

.if MODE == 1
	mov	$0x1b, %ecx		# x2APIC on: its registers are MSRs, in reach of real mode
	rdmsr
	or	$0xc00, %eax
	wrmsr
	mov	$0x80f, %ecx		# spurious vector register: APIC on
	mov	$0x1ff, %eax
	xor	%edx, %edx
	wrmsr
	mov	$0x830, %ecx		# interrupt command: INIT, then start-up at F000:0000,
	mov	$0x000c4500, %eax	# to all but this one
	wrmsr
	mov	$2000, %cx
1:	loop	1b
	mov	$0x830, %ecx
	mov	$0x000c46f0, %eax
	wrmsr
2:	jmp	2b
other:	jmp	other
.endif

.if MODE == 2
	mov	$0x1b, %ecx		# local APIC off: the PIC's interrupts go straight in
	rdmsr
	and	$0xfffff7ff, %eax
	wrmsr
	movw	$tick, 8*4		# IRQ 0 is interrupt 8
	movw	$0xf000, 8*4+2
	mov	$0x11, %al		# PIC: initialise, base 8, only IRQ 0
	outb	%al, $0x20
	mov	$0x08, %al
	outb	%al, $0x21
	mov	$0x04, %al
	outb	%al, $0x21
	mov	$0x01, %al
	outb	%al, $0x21
	mov	$0xfe, %al
	outb	%al, $0x21
	mov	$0x36, %al		# PIT channel 0, mode 3, divisor 65536
	outb	%al, $0x43
	xor	%al, %al
	outb	%al, $0x40
	outb	%al, $0x40
	sti
3:	hlt
	mov	$2000, %cx
4:	loop	4b
	jmp	3b
tick:	push	%ax
	mov	$0x20, %al
	outb	%al, $0x20
	pop	%ax
	iret
.endif

.if MODE == 3
	mov	$0x1000, %ax
	mov	%ax, %es
	xor	%ebx, %ebx		# sector
5:	mov	$0x1f2, %dx
	mov	$1, %al
	outb	%al, %dx
	inc	%dx
	mov	%bl, %al
	outb	%al, %dx
	inc	%dx
	mov	%bh, %al
	outb	%al, %dx
	inc	%dx
	xor	%al, %al
	outb	%al, %dx
	inc	%dx
	mov	$0xe0, %al
	outb	%al, %dx
	inc	%dx
	mov	$0x20, %al		# READ SECTORS
	outb	%al, %dx
6:	inb	%dx, %al
	test	$0x80, %al
	jnz	6b
	test	$0x09, %al		# DRQ or ERR
	jz	6b
	mov	$0x1f0, %dx
	xor	%di, %di
	mov	$256, %cx
	cld
	rep insw
	inc	%ebx
	cmp	$COUNT, %ebx
	jb	5b
	mov	$0x3f8, %dx
	mov	$'D', %al
	outb	%al, %dx
.endif

.if MODE != 1
other:
.endif
9:	hlt
	jmp	9b

.org 0xfff0
	ljmp	$0xf000, $0x0000
.org 0xffff
	.byte	0
